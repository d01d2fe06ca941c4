"""Prompts: the op graph, node by node, with PyTorch. Many tokens of one sequence are bound by matrix
products, which cuBLAS does well; keys and values go into the pages that the persistent program reads.

Sums, norms and the residual are f32; products take their inputs in the type of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tilert.backends.cuda import prompt_latent as latent
from tilert.backends.cuda.paged import PagedCaches
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Node, Value
from tilert.ir.program import PAGE, Scale

CHUNK = 2048  # most tokens at a time: bounds the memory that activations take
WARM = 256  # tokens of a prompt that warms up, as many as the engine gives at a time
_TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16,
          DType.F8E4M3: torch.float8_e4m3fn}  # fmt: skip


@dataclass(slots=True)
class _Step:
    """One chunk: where it lies in the sequence, and the values computed so far by name."""

    begin: int
    tokens: torch.Tensor  # [T]
    pages: torch.Tensor  # physical pages of the sequence
    outputs: torch.Tensor  # rows whose logits are wanted
    given: torch.Tensor | None = None  # [T, cols], where the graph has such an input
    values: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.begin + len(self.tokens)

    @property
    def positions(self) -> torch.Tensor:
        """[T]"""
        return torch.arange(self.begin, self.begin + len(self.tokens), device=self.tokens.device)


class PromptRunner:
    """Runs `graph` on the device of its weights.

    weights: as stored, by name, [rows, cols]. caches: 'layers.N.k_cache' and so on, each [pages, kv_heads,
    64, head_dim] as paged.py says. After a run, `hidden` is the graph's output besides the logits, f32 with
    a row for each token, or for each of `outputs`; where it has none, there are no rows.
    """

    hidden = torch.zeros(0, 0)

    def __init__(
        self, graph: Graph, weights: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor],
        scales: Mapping[str, Scale],
    ) -> None:  # fmt: skip
        self.graph, self.weights, self.caches, self.scales = graph, weights, caches, scales
        self.device = next(iter(weights.values())).device
        self.paged = PagedCaches(caches, self.device)
        self.ops: dict[str, Callable[[_Step, Node], torch.Tensor]] = {
            "embed": self._embed, "given": self._given, "rms_norm": self._rms_norm,
            "linear": self._linear, "add": self._add, "silu_mul": self._silu_mul,
            "rope": self._rope, "attention": self._attention, "latent_rope": self._latent_rope,
            "latent_attention": self._latent_attention, "index_rope": self._index_rope,
            "index_score": self._index_score, "select": self._select, "route": self._route,
            "experts": self._experts,
        }  # fmt: skip
        unknown = {node.op for node in graph.nodes} - self.ops.keys()
        assert not unknown, f"prompts cannot compute {', '.join(sorted(unknown))}"
        self.routing = {n.inputs["logits"] for n in graph.nodes if n.op == "route"}
        self.head = [node.output.rows == "outputs" for node in graph.nodes].index(True)
        last: dict[str, int] = {}
        for i, node in enumerate(graph.nodes):
            values = (v for v in node.inputs.values() if v is not None and not v.weight)
            last.update((v.name, i) for v in values if v not in graph.outputs)
        self.dead: list[list[str]] = [[] for _ in graph.nodes]  # values last used by each node
        for name, i in last.items():
            self.dead[i].append(name)

    def run(
        self, tokens: Sequence[int], begin: int, pages: Sequence[int], outputs: Sequence[int],
        given: np.ndarray | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """f32 logits [len(outputs), vocab_size] of rows of `tokens`, which start at position `begin`.

        Earlier positions must be in the cache; these are added to it. pages: of the whole sequence. given:
        f32, a row for each token, where the graph has such an input.
        Queued on the default stream, after what was launched there before; what comes later waits.
        """
        stream = torch.cuda.default_stream(self.device) if self.device.type == "cuda" else None
        with torch.inference_mode(), torch.cuda.stream(stream):
            return self._chunks(tokens, begin, pages, outputs, given)

    def warm_up(self) -> None:
        """Load what the first prompts would load: two pieces of one that leaves nothing in the caches."""
        rope = next(
            node for node in self.graph.nodes if "table" in node.inputs and node.op != "embed"
        )
        table = rope.inputs["table"]
        assert table is not None, f"{rope} lacks its table"
        count = min(WARM, len(self.weights[table.name]) // 2)
        pages = range(-(-2 * count // PAGE))
        caches = {n: c.new_zeros(len(pages), *c.shape[1:]) for n, c in self.caches.items()}
        scratch = PromptRunner(self.graph, self.weights, caches, self.scales)
        for begin, outputs in ((0, []), (count, [count - 1])):
            scratch.run([0] * count, begin, pages, outputs, self._blank(count)).cpu()

    def _blank(self, count: int) -> np.ndarray | None:
        """What a warm-up is given for so many tokens, if anything."""
        widths = [n.output.cols for n in self.graph.nodes if n.op == "given"]
        return np.zeros((count, widths[0]), np.float32) if widths else None

    def _chunks(
        self, tokens: Sequence[int], begin: int, pages: Sequence[int], outputs: Sequence[int],
        given: np.ndarray | None,
    ) -> torch.Tensor:  # fmt: skip
        found: dict[int, torch.Tensor] = {}
        hidden: list[torch.Tensor] = []
        table = torch.tensor(pages, dtype=torch.long, device=self.device)
        for first in range(0, len(tokens), CHUNK):
            ids = torch.tensor(tokens[first : first + CHUNK], dtype=torch.long, device=self.device)
            wanted = [row for row in outputs if first <= row < first + CHUNK]
            rows = torch.tensor([r - first for r in wanted], dtype=torch.long, device=self.device)
            step = _Step(begin + first, ids, table, rows)
            if given is not None:
                step.given = torch.from_numpy(given[first : first + CHUNK]).to(self.device)
            logits = self._chunk(step)
            found |= zip(wanted, logits, strict=True)
            hidden += [step.values[v.name] for v in self.graph.outputs if v.name in step.values]
        self.hidden = torch.cat(hidden) if hidden else torch.zeros(0, 0)
        vocab = self.graph.nodes[-1].output.cols
        if not outputs:
            return torch.zeros(0, vocab, device=self.device)
        return torch.stack([found[row] for row in outputs])

    def _chunk(self, step: _Step) -> torch.Tensor:
        for i, node in enumerate(self.graph.nodes):
            if i == self.head and not len(step.outputs):
                return torch.zeros(0, 0)
            step.values[node.output.name] = self.ops[node.op](step, node)
            for name in self.dead[i]:
                del step.values[name]
        return step.values[self.graph.nodes[-1].output.name].float()

    def _input(self, step: _Step, node: Node, name: str) -> torch.Tensor:
        value = node.inputs[name]
        assert value is not None, f"{node} lacks its input {name}"
        return self.weights[value.name] if value.weight else step.values[value.name]

    def _embed(self, step: _Step, node: Node) -> torch.Tensor:
        return self._input(step, node, "table")[step.tokens].float()

    def _given(self, step: _Step, node: Node) -> torch.Tensor:
        assert step.given is not None, f"{node} was given nothing"
        return step.given

    def _rms_norm(self, step: _Step, node: Node) -> torch.Tensor:
        x = self._input(step, node, "x")
        if node.output.rows == "outputs":
            x = x[step.outputs]
        return _norm(x, self._input(step, node, "weight"), node.attrs["eps"])

    def _linear(self, step: _Step, node: Node) -> torch.Tensor:
        value = node.inputs["w"]
        assert value is not None, f"{node} has no weight"
        w, bias = self._matrix(value), self._optional(node.inputs["bias"])
        if node.output in self.routing:  # what rounding moves would send a token to another expert
            w = w.float()
        if groups := int(node.attrs.get("groups", 0)):
            x = self._input(step, node, "x")
            return latent.block_linear(x, w, groups, int(node.attrs["stride"]))
        y = _product(self._input(step, node, "x"), w)
        return y if bias is None else y + bias.float()

    def _matrix(self, value: Value) -> torch.Tensor:
        """The weight of a product; one in FP8 is widened to bf16, which rounds it once more."""
        w = self.weights[value.name]
        if value.name not in self.scales:
            return w
        scale = self.scales[value.name]
        wide = self.weights[scale.name].repeat_interleave(scale.block[0], dim=0)[: w.shape[0]]
        wide = wide.repeat_interleave(scale.block[1], dim=1)[:, : w.shape[1]]
        return (w.float() * wide).to(torch.bfloat16)

    def _optional(self, value: Value | None) -> torch.Tensor | None:
        return None if value is None else self.weights[value.name].view(1, -1)

    def _add(self, step: _Step, node: Node) -> torch.Tensor:
        return self._input(step, node, "x") + self._input(step, node, "y")

    def _silu_mul(self, step: _Step, node: Node) -> torch.Tensor:
        return functional.silu(self._input(step, node, "gate")) * self._input(step, node, "up")

    def _route(self, step: _Step, node: Node) -> torch.Tensor:
        """f32 [T, experts]: the weights of those that each token goes to, else 0; ops/experts.py: Route."""
        logits, bias = self._input(step, node, "logits"), self._optional(node.inputs["bias"])
        scores = logits.sigmoid() if node.attrs["sigmoid"] else logits.softmax(dim=-1)
        values = scores if node.attrs["sigmoid"] else logits
        values = values if bias is None else values + bias.float()
        n_group = int(node.attrs["n_group"])
        if n_group > 1:
            groups = values.unflatten(-1, (n_group, -1))
            kept = _largest(groups.topk(2, dim=-1).values.sum(-1), int(node.attrs["topk_group"]))
            values = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        chosen = scores * _largest(values, int(node.attrs["top_k"]))
        if node.attrs["norm_topk_prob"]:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen * node.attrs["routed_scaling_factor"]

    def _experts(self, step: _Step, node: Node) -> torch.Tensor:
        """Expert after expert, so that no more than one is widened at a time."""
        x, weights = self._input(step, node, "x"), self._input(step, node, "route")
        banks = [node.inputs[name] for name in ("gate", "up", "down")]
        y = torch.zeros(len(x), node.output.cols, device=x.device)
        pairs = weights.T.nonzero()  # expert and token, by expert
        counts = pairs[:, 0].bincount(minlength=weights.shape[1]).tolist()
        for expert, rows in enumerate(pairs[:, 1].split(counts)):
            if not len(rows):
                continue
            gate, up, down = (self._matrix(bank.parts[expert]) for bank in banks if bank)
            inner = functional.silu(_product(x[rows], gate)) * _product(x[rows], up)
            y.index_add_(0, rows, _product(inner, down) * weights[rows, expert, None])
        return y

    def _rope(self, step: _Step, node: Node) -> torch.Tensor:
        d, layer = int(node.attrs["head_dim"]), int(node.attrs["layer"])
        angles = self._input(step, node, "table")[step.positions]
        turned: dict[str, torch.Tensor] = {}
        for name in ("q", "k"):
            x = self._input(step, node, name).view(len(step.tokens), -1, d)
            norm = self._optional(node.inputs[f"{name}_norm"])
            x = x if norm is None else _norm(x, norm, node.attrs["eps"])
            turned[name] = _rotate(x, angles[:, None])
        v = self._input(step, node, "v").view(len(step.tokens), -1, d)
        self._append(step, f"layers.{layer}.k_cache", turned["k"])
        self._append(step, f"layers.{layer}.v_cache", v)
        return turned["q"].reshape(len(step.tokens), -1)

    def _append(self, step: _Step, name: str, x: torch.Tensor) -> None:
        """x [T, kv_heads, head_dim] at the step's positions."""
        self.paged.append(name, step.pages, step.positions, x)

    def _cached(self, step: _Step, name: str, first_page: int) -> torch.Tensor:
        """[kv_heads, positions, head_dim] from a page on to the last token of the step."""
        return self.paged.read(name, step.pages, first_page, step.end)

    def _attention(self, step: _Step, node: Node) -> torch.Tensor:
        d, layer, window = (int(node.attrs[name]) for name in ("head_dim", "layer", "window"))
        first = max(0, step.begin + 1 - window) // PAGE if window else 0
        k, v = (self._cached(step, f"layers.{layer}.{kv}_cache", first) for kv in "kv")
        q = self._input(step, node, "q").view(len(step.tokens), -1, d).transpose(0, 1).to(k.dtype)
        y = _attend(q, k, v, node.attrs["scale"], self._mask(step, first * PAGE, window))
        return y.transpose(0, 1).reshape(len(step.tokens), -1).float()

    def _angles(self, step: _Step, node: Node) -> torch.Tensor:
        """[T, 1, columns]: cosines, then sines, for all heads."""
        return self._input(step, node, "table")[step.positions][:, None]

    def _latent_rope(self, step: _Step, node: Node) -> torch.Tensor:
        layer, heads, nope = (int(node.attrs[name]) for name in ("layer", "heads", "nope"))
        interleave, angles = bool(node.attrs["interleave"]), self._angles(step, node)
        kv, weight = self._input(step, node, "kv"), self._input(step, node, "norm")
        lora = weight.shape[-1]
        key = latent.turned(kv[:, None, lora:], angles, interleave)
        row = torch.cat([_norm(kv[:, None, :lora], weight, node.attrs["eps"]), key], dim=-1)
        self._append(step, f"layers.{layer}.latent_cache", row)
        q = self._input(step, node, "q").unflatten(1, (heads, -1))
        q = torch.cat([q[..., :nope], latent.turned(q[..., nope:], angles, interleave)], dim=-1)
        return q.flatten(1)

    def _latent_attention(self, step: _Step, node: Node) -> torch.Tensor:
        layer, heads, lora, nope = (int(node.attrs[n]) for n in ("layer", "heads", "lora", "nope"))
        rotated = self._input(step, node, "rotated").unflatten(1, (heads, -1))[..., nope:]
        q = torch.cat([self._input(step, node, "q").unflatten(1, (heads, lora)), rotated], dim=-1)
        rows = self._cached(step, f"layers.{layer}.latent_cache", 0)[0]
        if node.inputs["selected"] is None:
            mask = torch.arange(step.end, device=self.device) <= step.positions[:, None]
        else:
            mask = self._input(step, node, "selected")
        return latent.attend(q, rows, lora, node.attrs["scale"], mask).flatten(1)

    def _index_rope(self, step: _Step, node: Node) -> torch.Tensor:
        k, angles = self._input(step, node, "k"), self._angles(step, node)
        norm, shift = self._input(step, node, "norm"), self._input(step, node, "bias")
        layer, interleave = int(node.attrs["layer"]), bool(node.attrs["interleave"])
        key = latent.index_key(k, norm, shift, node.attrs["eps"], angles, interleave)
        q = self._input(step, node, "q").unflatten(1, (-1, k.shape[1]))
        q = latent.index_query(q, angles, interleave)
        if latent.append_key(self.paged, layer, step.pages, step.positions, key):
            values, scale = latent.quantised(q)
            q = values.float() * scale
        return q.flatten(1)

    def _index_score(self, step: _Step, node: Node) -> torch.Tensor:
        q, weights = self._input(step, node, "q"), self._input(step, node, "weights")
        return latent.index_scores(
            self.paged, int(node.attrs["layer"]), step.pages, step.end,
            q.unflatten(1, (weights.shape[1], -1)), weights, node.attrs["scale"],
        )  # fmt: skip

    def _select(self, step: _Step, node: Node) -> torch.Tensor:
        """bool [T, positions]"""
        return latent.select(
            self._input(step, node, "scores"), step.positions, int(node.attrs["topk"])
        )

    def _mask(self, step: _Step, first: int, window: int) -> torch.Tensor | None:
        """[T, keys from `first` on] which keys a query sees; None for all up to its own."""
        end = step.end
        if step.begin == 0 and (window == 0 or end <= window):
            return None
        ago = step.positions[:, None] - torch.arange(first, end, device=self.device)
        return (ago >= 0) & (ago < window) if window else ago >= 0


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """q [heads, T, d], k and v [kv_heads, S, d] to [heads, T, d].

    Only inputs of four dimensions reach the fused kernels, which do not hold all scores at once.
    """
    heads, kv_heads = q.shape[0], k.shape[0]
    attend = functional.scaled_dot_product_attention
    if mask is None:
        return attend(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]
    # Several query heads share a kv head: [1, kv_heads, group * T, d] needs no copies of k and v.
    rows = mask.repeat(heads // kv_heads, 1)
    shared = q.reshape(1, kv_heads, -1, q.shape[-1])
    return attend(shared, k[None], v[None], attn_mask=rows, scale=scale).reshape(q.shape)


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """f32; x is taken in the type of the weight."""
    return functional.linear(x.to(w.dtype), w).float()


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Which of each row are its `count` largest; among equal ones those with the lowest index."""
    order = x.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight.view(-1).float(), eps)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """ops/rope.py: rotate; angles: cosines, then sines, on the last axis."""
    low, high = x.chunk(2, dim=-1)
    cosine, sine = angles.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def over_memory(
    graph: Graph, weights: Mapping[str, tuple[Any, np.ndarray]],
    caches: Mapping[str, tuple[Any, tuple[int, ...], DType]], scales: Mapping[str, Scale],
) -> PromptRunner:  # fmt: skip
    """A runner over memory of the device, each with an array of its type and shape, or both of them."""
    typed = {
        name: memory.tensor.view(_TORCH[DType.of(array)]).view(array.shape)
        for name, (memory, array) in weights.items()
    }
    pages = {
        name: memory.tensor.view(_TORCH[dtype]).view(shape)
        for name, (memory, shape, dtype) in caches.items()
    }
    return PromptRunner(graph, typed, pages, scales)
