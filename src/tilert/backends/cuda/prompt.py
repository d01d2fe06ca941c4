"""Prompts: the op graph, node by node, with PyTorch. Many tokens of one sequence are bound by matrix
products, which cuBLAS does well; keys and values go into the pages that the persistent program reads.

Sums, norms and the residual are f32; products take their inputs, and leave their results, in the type of
the weights. What a step costs beside its products is mostly the number of calls: what all layers share is
made once, and nothing but the last rows' logits is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilert.backends.cuda import prompt_experts as experts
from tilert.backends.cuda import prompt_latent as latent
from tilert.backends.cuda.paged import StepCaches
from tilert.backends.cuda.runtime import RUNNER_ROWS
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Node, Value
from tilert.ir.program import JOIN, PAGE, Scale

CHUNK = RUNNER_ROWS  # most tokens at a time: bounds the memory that activations take
SCORES = 1 << 25  # most scores of an indexer, of each token for each position
WARM = 256  # tokens of each piece of a prompt that warms up
# Not cuDNN's, which PyTorch prefers on some cards: it makes a plan for every new length, while a user waits.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FLASH_WIDTH = 256  # elements of the widest heads that flash attention takes
_TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16,
          DType.F8E4M3: torch.float8_e4m3fn, DType.U8: torch.uint8}  # fmt: skip


@dataclass(slots=True)
class _Step:
    """One chunk: positions [begin, end) of the sequence, and the values computed so far by name."""

    begin: int
    tokens: torch.Tensor  # [T]
    outputs: torch.Tensor  # rows whose logits are wanted
    caches: StepCaches
    given: torch.Tensor | None = None  # [T, cols], where the graph has such an input
    values: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    chosen: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])  # experts
    shared: dict[Any, torch.Tensor] = field(default_factory=dict[Any, torch.Tensor])

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.begin + len(self.tokens)

    @property
    def positions(self) -> torch.Tensor:
        """[T]"""
        return self.once("positions", lambda: self.since(self.begin))

    def since(self, first: int) -> torch.Tensor:
        """Positions from `first` on."""
        return torch.arange(first, self.end, device=self.tokens.device)

    def once(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, made for the first layer that asks for it."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


class PromptRunner:
    """Runs `graph` on the device of its weights.

    weights: as stored, by name, [rows, cols]; a bank's matrices one after another, under their joined names,
    and their scales likewise. caches: 'layers.N.k_cache' and so on, each [pages, kv_heads, 64, head_dim] as
    paged.py says. After a run, `hidden` is the graph's output besides the logits, f32 with a row for each
    token, or for each of `outputs`; where it has none, there are no rows.
    """

    hidden = torch.zeros(0, 0)

    def __init__(
        self, graph: Graph, weights: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor],
        scales: Mapping[str, Scale],
    ) -> None:  # fmt: skip
        self.graph, self.weights, self.caches, self.scales = graph, weights, caches, scales
        self.device = next(iter(weights.values())).device
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
        self.vectors = {n: w.view(-1).float() for n, w in weights.items() if w.shape[0] == 1}
        self.banks = {
            v: self._bank(v) for n in graph.nodes for v in n.inputs.values() if v and v.parts
        }
        self.indexed = any(node.op == "index_score" for node in graph.nodes)
        self.narrow = self._narrow()
        self.head = [node.output.rows == "outputs" for node in graph.nodes].index(True)
        last: dict[str, int] = {}
        for i, node in enumerate(graph.nodes):
            values = (v for v in node.inputs.values() if v is not None and not v.weight)
            last.update((v.name, i) for v in values if v not in graph.outputs)
        self.dead: list[list[str]] = [[] for _ in graph.nodes]  # values last used by each node
        for name, i in last.items():
            self.dead[i].append(name)

    def _bank(self, value: Value) -> experts.Bank:
        name, count = JOIN.join(part.name for part in value.parts), len(value.parts)
        w = self.weights[name].unflatten(0, (count, -1))
        if name not in self.scales:
            return experts.Bank(w)
        scale = self.scales[name]
        return experts.Bank(w, self.weights[scale.name].unflatten(0, (count, -1)), scale.block)

    def _narrow(self) -> dict[str, torch.dtype]:
        """The values that only products of one type take, and that type: they are rounded to it once."""
        taken: dict[str, set[torch.dtype]] = {}
        for node in self.graph.nodes:
            for name, value in node.inputs.items():
                if value is not None and not value.weight:
                    of = self._taken(node) if name == "x" else torch.float32
                    taken.setdefault(value.name, set()).add(of)
        for value in self.graph.outputs:
            taken.setdefault(value.name, set()).add(torch.float32)
        wide = {torch.float32}
        return {n: types.pop() for n, types in taken.items() if len(types) == 1 and types != wide}

    def _taken(self, node: Node) -> torch.dtype:
        """The type in which a node takes its input x."""
        if node.op == "experts":
            gate = node.inputs["gate"]
            assert gate is not None, f"{node} has no experts"
            return self.banks[gate].taken
        w = node.inputs.get("w")
        if node.op != "linear" or w is None or node.output in self.routing:
            return torch.float32
        return torch.bfloat16 if w.name in self.scales else self.weights[w.name].dtype

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
        with torch.inference_mode(), torch.cuda.stream(stream), sdpa_kernel(ATTENTION):
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
        table, first = self._integers(pages), 0
        while first < len(tokens):
            at, end = begin + first, min(first + self._most(begin + first), len(tokens))
            wanted = [row for row in outputs if first <= row < end]
            rows = self._integers([row - first for row in wanted])
            caches = StepCaches(self.caches, table, at, begin + end)
            step = _Step(at, self._integers(tokens[first:end]), rows, caches)
            if given is not None:
                step.given = torch.from_numpy(given[first:end]).to(self.device)
            logits = self._chunk(step)
            found |= zip(wanted, logits, strict=True)
            hidden += [step.values[v.name] for v in self.graph.outputs if v.name in step.values]
            first = end
        self.hidden = torch.cat(hidden) if hidden else torch.zeros(0, 0)
        vocab = self.graph.nodes[-1].output.cols
        if not outputs:
            return torch.zeros(0, vocab, device=self.device)
        return torch.stack([found[row] for row in outputs])

    def _most(self, begin: int) -> int:
        """Tokens of the chunk at a position: fewer after many others where an indexer scores them all."""
        return min(CHUNK, max(PAGE, SCORES // (begin + CHUNK))) if self.indexed else CHUNK

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        """On the device, without waiting for what it does: pinned memory is copied when its turn comes."""
        gpu = self.device.type == "cuda"
        host = torch.tensor(values, dtype=torch.long, pin_memory=gpu)
        return host.to(self.device, non_blocking=True)

    def _chunk(self, step: _Step) -> torch.Tensor:
        for i, node in enumerate(self.graph.nodes):
            if i == self.head and not len(step.outputs):
                return torch.zeros(0, 0)
            made, name = self.ops[node.op](step, node), node.output.name
            for dead in self.dead[i]:  # before another copy is made
                del step.values[dead]
            step.values[name] = made.to(self.narrow[name]) if name in self.narrow else made
            del made
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

    def _vector(self, node: Node, name: str) -> torch.Tensor | None:
        """A weight of one row in f32; None where the node has none."""
        value = node.inputs[name]
        return None if value is None else self.vectors[value.name]

    def _norm(self, x: torch.Tensor, node: Node, name: str) -> torch.Tensor:
        """f32 RMSNorm of x [.., width], whose weight is the node's input of that name."""
        return functional.rms_norm(
            x.float(), (x.shape[-1],), self._vector(node, name), node.attrs["eps"]
        )

    def _rms_norm(self, step: _Step, node: Node) -> torch.Tensor:
        x = self._input(step, node, "x")
        return self._norm(x[step.outputs] if node.output.rows == "outputs" else x, node, "weight")

    def _linear(self, step: _Step, node: Node) -> torch.Tensor:
        """In the type of the weight; f32 with a bias, and where the weight is."""
        x, value = self._input(step, node, "x"), node.inputs["w"]
        assert value is not None, f"{node} has no weight"
        if groups := int(node.attrs.get("groups", 0)):
            return latent.block_linear(x, self._matrix(value), groups, int(node.attrs["stride"]))
        if node.output in self.routing:  # what rounding moves would send a token to another expert
            y = functional.linear(x.float(), self._matrix(value).float())
        elif value.name in self.scales:
            scale = self.scales[value.name]
            w, factors = self.weights[value.name], self.weights[scale.name]
            y = experts.scaled_product(x, w, factors, scale.block)
        else:
            w = self.weights[value.name]
            y = functional.linear(x.to(w.dtype), w)
        bias = self._vector(node, "bias")
        return y if bias is None else y + bias

    def _matrix(self, value: Value) -> torch.Tensor:
        """The weight of a product; one in FP8 is widened to bf16, which rounds it once more."""
        w = self.weights[value.name]
        if value.name not in self.scales:
            return w
        scale = self.scales[value.name]
        return experts.widened(w, self.weights[scale.name], scale.block)

    def _add(self, step: _Step, node: Node) -> torch.Tensor:
        return self._input(step, node, "x").float() + self._input(step, node, "y")

    def _silu_mul(self, step: _Step, node: Node) -> torch.Tensor:
        return experts.gated(self._input(step, node, "gate"), self._input(step, node, "up"))

    def _route(self, step: _Step, node: Node) -> torch.Tensor:
        """[T, top_k] weights; the experts that they are of stay beside them."""
        logits, bias = self._input(step, node, "logits"), self._vector(node, "bias")
        step.chosen[node.output.name], weights = experts.choose(logits, bias, node.attrs)
        return weights

    def _experts(self, step: _Step, node: Node) -> torch.Tensor:
        route = node.inputs["route"]
        assert route is not None, f"{node} has no route"
        banks = [self.banks[v] for v in map(node.inputs.get, ("gate", "up", "down")) if v]
        x, weights = self._input(step, node, "x"), self._input(step, node, "route")
        return experts.mixture(x, step.chosen[route.name], weights, *banks)

    def _angles(self, step: _Step, node: Node) -> torch.Tensor:
        """[T, 1, columns]: cosines, then sines, for all heads."""
        return self._input(step, node, "table")[step.begin : step.end][:, None]

    def _rope(self, step: _Step, node: Node) -> torch.Tensor:
        d, layer = int(node.attrs["head_dim"]), int(node.attrs["layer"])
        table = node.inputs["table"]
        assert table is not None, f"{node} has no table"
        cosines, sines = self._angles(step, node).chunk(2, dim=-1)
        cosines = step.once((table, "cos"), lambda: torch.cat([cosines, cosines], dim=-1))
        sines = step.once((table, "sin"), lambda: torch.cat([-sines, sines], dim=-1))
        turned: dict[str, torch.Tensor] = {}
        for name in ("q", "k"):
            x = self._input(step, node, name).view(len(step.tokens), -1, d)
            normed = node.inputs[f"{name}_norm"] is not None
            x = self._norm(x, node, f"{name}_norm") if normed else x.float()
            # ops/rope.py: rotate
            turned[name] = (x * cosines).addcmul_(x.roll(d // 2, dims=-1), sines)
        step.caches.append(f"layers.{layer}.k_cache", turned["k"])
        v = self._input(step, node, "v").view(len(step.tokens), -1, d)
        step.caches.append(f"layers.{layer}.v_cache", v)
        return turned["q"].flatten(1)

    def _attention(self, step: _Step, node: Node) -> torch.Tensor:
        d, layer, window = (int(node.attrs[name]) for name in ("head_dim", "layer", "window"))
        first = max(0, step.begin + 1 - window) // PAGE if window else 0
        k, v = (step.caches.read(f"layers.{layer}.{kv}_cache", first) for kv in "kv")
        q = self._input(step, node, "q").view(len(step.tokens), -1, d).transpose(0, 1).to(k.dtype)
        if window == 0 or step.end <= window:
            y = attend_all(q, k, v, node.attrs["scale"])
        else:
            y = attend(q, k, v, node.attrs["scale"], self._mask(step, first * PAGE, window))
        return y.transpose(0, 1).flatten(1)

    def _mask(self, step: _Step, first: int, window: int) -> torch.Tensor:
        """[T, keys from `first` on] which keys a query sees."""

        def make() -> torch.Tensor:
            ago = step.positions[:, None] - step.since(first)
            return (ago >= 0) & (ago < window)

        return step.once(("mask", first, window), make)

    def _latent_rope(self, step: _Step, node: Node) -> torch.Tensor:
        layer, heads, nope = (int(node.attrs[name]) for name in ("layer", "heads", "nope"))
        interleave, angles = bool(node.attrs["interleave"]), self._angles(step, node)
        kv = self._input(step, node, "kv")[:, None]
        lora = kv.shape[-1] - angles.shape[-1]
        key = latent.turned(kv[..., lora:], angles, interleave)
        row = torch.cat([self._norm(kv[..., :lora], node, "norm"), key], dim=-1)
        latent.append_row(step.caches, layer, row, lora)
        q = self._input(step, node, "q").unflatten(1, (heads, -1))
        q = torch.cat([q[..., :nope], latent.turned(q[..., nope:], angles, interleave)], dim=-1)
        return q.flatten(1)

    def _latent_attention(self, step: _Step, node: Node) -> torch.Tensor:
        layer, heads, lora, nope = (int(node.attrs[n]) for n in ("layer", "heads", "lora", "nope"))
        rotated = self._input(step, node, "rotated").unflatten(1, (heads, -1))[..., nope:]
        q = self._input(step, node, "q").unflatten(1, (heads, lora))
        rows = latent.rows(step.caches, layer, lora)
        if node.inputs["selected"] is None:
            mask = step.once("seen", lambda: step.since(0) <= step.positions[:, None])
        else:
            mask = self._input(step, node, "selected")
        return latent.attend(q, rotated, rows, node.attrs["scale"], mask).flatten(1)

    def _index_rope(self, step: _Step, node: Node) -> torch.Tensor:
        k, angles = self._input(step, node, "k"), self._angles(step, node)
        norm, shift = self._vector(node, "norm"), self._vector(node, "bias")
        layer, interleave = int(node.attrs["layer"]), bool(node.attrs["interleave"])
        key = functional.layer_norm(k.float(), (k.shape[1],), norm, shift, node.attrs["eps"])
        key = latent.index_query(key[:, None], angles, interleave)
        q = self._input(step, node, "q").unflatten(1, (-1, k.shape[1]))
        q = latent.index_query(q, angles, interleave)
        if latent.append_key(step.caches, layer, key):
            values, scale = latent.quantised(q)
            q = values.float() * scale
        return q.flatten(1)

    def _index_score(self, step: _Step, node: Node) -> torch.Tensor:
        q, weights = self._input(step, node, "q"), self._input(step, node, "weights").float()
        return latent.index_scores(
            step.caches, int(node.attrs["layer"]), q.unflatten(1, (weights.shape[1], -1)), weights,
            node.attrs["scale"],
        )  # fmt: skip

    def _select(self, step: _Step, node: Node) -> torch.Tensor:
        """bool [T, positions]"""
        return latent.select(
            self._input(step, node, "scores"), step.positions, int(node.attrs["topk"])
        )


def attend_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [heads, T, d], k and v [kv_heads, S, d] to [heads, T, d]: the queries are those of the last T keys,
    and each sees all keys up to its own."""
    count, past = q.shape[1], k.shape[1] - q.shape[1]
    if not past:
        attention = functional.scaled_dot_product_attention
        return attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]
    if q.is_cuda and q.element_size() == 2 and q.shape[-1] <= FLASH_WIDTH:
        # Causal means "up to the last key" here. torch.nn.attention.bias.causal_lower_right comes to the same
        # call, but takes more than a second to import; a mask would have an element for each head's score.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q[None], k[None], v[None], 0.0, True, False, scale=scale)[0][0]
    seen = torch.ones(count, past + count, dtype=torch.bool, device=q.device).tril(past)
    return attend(q, k, v, scale, seen)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """As attend_all, with a mask [T, S] of the keys that a query sees.

    Only inputs of four dimensions reach the fused kernels, which do not hold all scores at once. Several
    query heads share a kv head: [1, kv_heads, group * T, d] needs no copies of k and v.
    """
    rows = mask.repeat(len(q) // len(k), 1)
    shared = q.reshape(1, len(k), -1, q.shape[-1])
    attention = functional.scaled_dot_product_attention
    return attention(shared, k[None], v[None], attn_mask=rows, scale=scale).reshape(q.shape)


def over_memory(
    graph: Graph, weights: Mapping[str, tuple[Any, tuple[int, ...], DType]],
    caches: Mapping[str, tuple[Any, tuple[int, ...], DType]], scales: Mapping[str, Scale],
) -> PromptRunner:  # fmt: skip
    """A runner over memory of the device, each with the shape and the type of what is there."""
    typed, pages = (
        {
            name: memory.tensor.view(_TORCH[dtype]).view(shape)
            for name, (memory, shape, dtype) in of.items()
        }
        for of in (weights, caches)
    )
    return PromptRunner(graph, typed, pages, scales)
