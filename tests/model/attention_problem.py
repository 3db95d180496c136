"""Decoding sequences over a paged cache, and what attention gives for them in fp64."""

import torch

CONTEXTS = (1, 15, 16, 17, 256, 257, 300, 513)
SHAPES = [  # heads, key/value heads, key size, value size, whether values are the beginning of keys
    (16, 8, 64, 64, False),
    (4, 2, 24, 16, False),
    (7, 7, 28, 20, False),
    (20, 1, 40, 32, True),
    (36, 2, 16, 16, False),
    (18, 1, 576, 512, True),
]
EXTRAS = [
    {},
    {"softcap": 20.0},
    {"sinks_H": True},
    {"window": 37},
    {"softcap": 5.0, "sinks_H": True, "window": 300},
]


class Problem:
    def __init__(self, shape, dtype, block_size=16, softcap=None, sinks_H=None, window=None):
        heads, groups, k_size, v_size, shared = shape
        generator = torch.Generator().manual_seed(0)

        def random(*sizes):
            return torch.randn(sizes, generator=generator)

        count, width = len(CONTEXTS), -(-max(CONTEXTS) // block_size)
        self.q = (2 * random(count, heads, k_size)).to(dtype)
        self.k = random(count * width * block_size, groups, k_size).to(dtype)
        self.v = self.k[..., :v_size] if shared else random(len(self.k), groups, v_size).to(dtype)
        self.tables = torch.randperm(count * width, generator=generator).view(count, width)
        self.end = torch.tensor(CONTEXTS)
        self.first = torch.zeros_like(self.end) if window is None else (self.end - window).clamp(min=0)
        self.block_size = block_size
        self.options = {
            "scale": k_size**-0.5,
            "softcap": softcap,
            "sinks_H": None if sinks_H is None else 3 * random(heads),
        }

    def solve(self, decode, rows=slice(None), **more):
        return decode(
            self.q[rows], self.k, self.v, self.tables[rows], self.first[rows], self.end[rows], self.block_size,
            **self.options, **more,
        )  # fmt: skip

    def to(self, device):
        """The same, on this device."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        self.options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        return self

    def expected(self):
        return torch.stack([self._expected(b) for b in range(len(self.q))])

    def _expected(self, b):
        at = torch.arange(int(self.first[b]), int(self.end[b]))
        slots = self.tables[b, at // self.block_size] * self.block_size + at % self.block_size
        repeats = self.q.shape[1] // self.k.shape[1]
        k_HLD, v_HLD = (x[slots].double().transpose(0, 1).repeat_interleave(repeats, 0) for x in (self.k, self.v))
        scores = (k_HLD @ self.q[b].double()[..., None])[..., 0] * self.options["scale"]
        if self.options["softcap"]:
            scores = self.options["softcap"] * torch.tanh(scores / self.options["softcap"])
        if self.options["sinks_H"] is not None:
            scores = torch.cat([scores, self.options["sinks_H"].double()[:, None]], -1)
        p_HL = scores.softmax(-1)[:, : len(at)]
        return (p_HL[:, None] @ v_HLD)[:, 0]
