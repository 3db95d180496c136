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
        enable_prefix_caching=False,
    )  # fmt: skip
    vocab = llm.model_config.get_vocab_size()
    print("PEER {}", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        prompts = [
            {"prompt_token_ids": [random.randrange(vocab) for _ in range(ask["prompt"])]} for _ in range(ask["batch"])
        ]
        params = SamplingParams(temperature=1.0, max_tokens=ask["output"], ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        waiting = {str(i) for i in range(ask["batch"])}
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(i), prompt, params)
        while waiting:
            waiting -= {output.request_id for output in llm.llm_engine.step() if output.outputs[0].token_ids}
        first_s = time.perf_counter() - began
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        print("PEER " + json.dumps({"first_s": first_s, "total_s": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
