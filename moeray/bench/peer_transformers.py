"""transformers' `generate` as a peer; run by its own Python. usage: peer_transformers.py MODEL"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(model_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()
    vocab = model.config.vocab_size
    print("PEER {}", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        ids = torch.randint(0, vocab, (ask["batch"], ask["prompt"]))
        times = [time.perf_counter()]

        def token(input_ids: torch.Tensor, scores: object, times: list[float] = times) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask["output"], min_new_tokens=ask["output"],
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=0,
            stopping_criteria=[token],
        )  # fmt: skip
        print("PEER " + json.dumps({"first_s": times[1] - times[0], "total_s": times[-1] - times[0]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
