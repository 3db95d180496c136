"""vLLM as a peer; run by its own Python. usage: peer_vllm.py MODEL"""

import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main(model: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, max_num_seqs=64,
        enable_prefix_caching=False, disable_log_stats=False,
    )  # fmt: skip
    vocab = llm.model_config.get_vocab_size()
    print("PEER {}", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        prompts = [
            {"prompt_token_ids": [random.randrange(vocab) for _ in range(ask["prompt"])]} for _ in range(ask["batch"])
        ]
        params = SamplingParams(temperature=1.0, max_tokens=ask["output"], ignore_eos=True, detokenize=False)
        began = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        ended = time.monotonic()
        first = max(output.metrics.first_token_ts for output in outputs)
        print("PEER " + json.dumps({"first_s": first - began, "total_s": ended - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
