"""Expert adapters in every known file layout -> `ExpertLoRA`. Names and shapes decide; nothing is declared by a flag.

A layout comes down to *pieces*: tensors of one projection (gate, up, gate_up or down) that hold A or B of one expert, of all, or one matrix for all. All
shapes, ranks and pairs are checked from the file's header before any weight is read; then each tensor is read once and copied to its place.

    per expert, 2D          experts.{e}.gate_proj.lora_A [R, in], lora_B [out, R]; w1, w3, w2 = gate, up, down; experts may be missing
    native 3D               experts.gate_up_proj.lora_A [E, R or 2R, in], lora_B [E, out, R]; also gate_proj, up_proj, w1, ...
    shared outer            as either of these, one side without expert: [1, R, in] or [R, in]
    flattened (PEFT 0.17+)  experts.lora_A [E * R, in], lora_B [out, R * E]; two parameters of one module nest as experts.base_layer
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_lora_moe.lora.adapter_config import AdapterConfig
from sglang_lora_moe.lora.adapter_file import AdapterError, AdapterTensors
from sglang_lora_moe.lora.targets import ExpertTarget
from sglang_lora_moe.lora.weights import ExpertLoRA

# Leaf names -> projection. The plural ones are gpt-oss with experts split into linears (`gate_up_projs.{e}`)
PROJECTIONS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
PROJECTIONS |= {"gate_up_proj": "gate_up", "gate_up_projs": "gate_up", "down_projs": "down"}
INNER, OUTER = "base_layer", ""  # "projections" of PEFT's flattened keys, until it is known which parameter they belong to
_LEAVES = {"gate": "gate_proj", "up": "up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}


class ExpertKey(NamedTuple):
    """One tensor of an adapter file that belongs to a layer's experts."""

    key: str  # tensor name in the file
    module: str  # module name in the file, which rank_pattern and alpha_pattern address
    projection: str  # a value of PROJECTIONS, INNER or OUTER
    expert: int | None  # None = not of one expert
    half: str  # "A" or "B"


@dataclass
class AdapterSource:
    """An open adapter and the limits it is read under."""

    file: AdapterTensors
    config: AdapterConfig
    max_rank: int
    dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)

    def error(self, key: str, expected: object, found: object, hint: str = "") -> AdapterError:
        return AdapterError(f"{self.file.path}: {key}: expected {expected}, found {found}.{' ' + hint if hint else ''}")

    def wrong_shape(self, key: str, expected: str) -> AdapterError:
        base = f" {self.config.path.name} names {self.config.base_model!r}." if self.config.base_model else ""
        return self.error(key, expected, list(self.shape(key)), f"The adapter was made for another base model.{base}")

    def warn(self, text: str) -> None:
        """Once, however many layers it holds for."""
        if text not in self.warnings:
            self.warnings.append(text)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.file.entries[key].shape

    def check_rank(self, key: str, rank: int, name: str) -> None:
        if rank < 1:
            raise self.error(key, "a rank of at least 1", list(self.shape(key)), "It looks saved from sharded weights; gather them before saving.")
        if rank > self.max_rank:
            raise self.error(key, f"a rank of at most {self.max_rank}", f"rank {rank}", f"Start the server with --max-lora-rank {rank}.")
        if rank != (stated := self.config.rank(name)):
            hint = f"The scaling alpha / r would be a guess; state the rank in {self.config.path.name} (r, rank_pattern)."
            raise self.error(key, f"rank {stated} for {name}", f"rank {rank}", hint)


@dataclass
class Piece:
    """A tensor as [n, rows, cols]: n = 1 for one expert or a matrix shared by all, E for all experts."""

    key: str
    module: str
    expert: int | None
    shape: tuple[int, int, int]
    transform: Callable[[Tensor], Tensor]
    scaling: float = 1.0  # of B pieces

    @property
    def shared(self) -> bool:
        return self.expert is None and self.shape[0] == 1


@dataclass
class Projection:
    """A and B of one projection, checked. With `split` A holds R rows for gate and R for up."""

    a: list[Piece]
    b: list[Piece]
    rank: int
    split: bool = False


def read_experts(source: AdapterSource, target: ExpertTarget, keys: list[ExpertKey]) -> ExpertLoRA:
    """All tensors of one layer's experts as one `ExpertLoRA`."""
    by_projection: dict[str, list[ExpertKey]] = {}
    for key in keys:
        by_projection.setdefault(key.projection, []).append(key)
    if INNER in by_projection or OUTER in by_projection:
        projections = _plan_flattened(source, target, by_projection)
    else:
        projections = {name: _plan_named(source, target, name, group) for name, group in by_projection.items()}
    w13: dict[str, Projection] = {name: projections[name] for name in ("gate_up", "gate", "up") if name in projections}
    if len(w13) > 1 and "gate_up" in w13:
        raise source.error(keys[0].key, "gate_up_proj or gate_proj and up_proj", f"both for {target.name}")
    a13, b13, split, scaling13 = _fill_w13(source, target, w13) if w13 else (None, None, False, 0.0)
    if "down" not in projections:
        return ExpertLoRA(a13, b13, split, scaling13)
    down = projections["down"]
    scaling2 = max((piece.scaling for piece in down.b), key=abs)
    a2 = _fill(source, target, [(down.a, 0)], down.rank, target.intermediate)
    b2 = _fill(source, target, [(down.b, 0)], target.hidden, down.rank, scaling2)
    return ExpertLoRA(a13, b13, split, scaling13, a2, b2, scaling2)


# ---- plan: keys with a projection in their name -----------------------------------------------------------------------
def _sizes(target: ExpertTarget, projection: str) -> tuple[int, int]:
    """(in, out) of a projection."""
    inter, hidden = target.intermediate, target.hidden
    return {"gate": (hidden, inter), "up": (hidden, inter), "gate_up": (hidden, target.w13_rows), "down": (inter, hidden)}[projection]


def _plan_named(source: AdapterSource, target: ExpertTarget, projection: str, keys: list[ExpertKey]) -> Projection:
    """Keys `experts.[{e}.]{leaf}.lora_{A,B}` of one projection."""
    if not target.gated and projection != "up" and projection != "down":
        raise source.error(keys[0].key, f"up_proj and down_proj, as {target.name} has no gate", projection)
    halves = {half: {key.expert: key for key in keys if key.half == half} for half in "AB"}
    numbered = None not in halves["A"] and None not in halves["B"]
    for half, other in ("AB", "BA"):
        own, others = halves[half], halves[other]
        if not own:
            raise missing_half(source, next(iter(others.values())).key)
        if None in own and len(own) > 1:
            raise source.error(own[None].key, "one matrix for all experts or one for each", "both")
        absent = [] if None in own else [expert for expert in (others if numbered else range(target.num_experts)) if expert not in own]
        if absent and numbered:
            raise missing_half(source, others[absent[0]].key)
        if absent:  # the other half is one matrix for all experts
            hint = "The file is incomplete; save the adapter again."
            raise source.error(next(iter(own.values())).key, f"a lora_{half} for each of {target.num_experts} experts", f"none for {absent[:8]}", hint)
    if numbered and len(halves["A"]) < target.num_experts:
        without = [expert for expert in range(target.num_experts) if expert not in halves["A"]]
        source.warn(f"the file has nothing for experts {without[:8]} of {target.num_experts} in some layers, where the base model stays as it is")
    if _is_flattened(source, target, halves):
        a, b = halves["A"][None], halves["B"][None]
        return _flattened(source, target, {projection: (a.key, b.key, a.module)})[projection]
    inputs, outputs = _sizes(target, projection)
    a_pieces = [_named_piece(source, target, key, (None, inputs)) for key in halves["A"].values()]
    b_pieces = [_named_piece(source, target, key, (outputs, None)) for key in halves["B"].values()]
    return _checked(source, projection, a_pieces, b_pieces)


def missing_half(source: AdapterSource, key: str) -> AdapterError:
    """`key` is one of a pair whose other half is not in the file."""
    head, _, tail = key.rpartition("lora_")
    at = len("embedding_") if tail.startswith("embedding_") else 0
    other = f"{head}lora_{tail[:at]}{'B' if tail[at] == 'A' else 'A'}{tail[at + 1 :]}"
    return source.error(other, f"the other half of {key}", "no such tensor", "The file is incomplete; save the adapter again.")


def _is_flattened(source: AdapterSource, target: ExpertTarget, halves: dict[str, dict[int | None, ExpertKey]]) -> bool:
    """Whether 2D tensors named after a fused parameter hold all experts (rows = E * R) rather than one matrix for all."""
    a, b = halves["A"].get(None), halves["B"].get(None)
    if a is None or b is None or len(source.shape(a.key)) != 2 or len(source.shape(b.key)) != 2 or target.num_experts == 1:
        return False
    return source.shape(a.key)[0] == source.shape(b.key)[1] == target.num_experts * source.config.rank(a.module)


def _named_piece(source: AdapterSource, target: ExpertTarget, key: ExpertKey, size: tuple[int | None, int | None]) -> Piece:
    """A piece whose tensor is [rows, cols] or [1 or E, rows, cols]; `size` is what rows and cols must be, None = a rank."""
    if key.expert is not None and key.expert >= target.num_experts:
        raise source.error(key.key, f"an expert below {target.num_experts}", f"expert {key.expert}", "The adapter was made for another base model.")
    found = source.shape(key.key)
    shape = (1, *found) if len(found) == 2 else found
    counts = (1,) if key.expert is not None else (1, target.num_experts)
    if len(shape) != 3 or shape[0] not in counts or any(want not in (None, have) for want, have in zip(size, shape[1:], strict=True)):
        matrix = ", ".join("R" if want is None else str(want) for want in size)
        raise source.wrong_shape(key.key, f"[{matrix}]" + (f" or [1 or {target.num_experts}, {matrix}]" if key.expert is None else ""))
    return Piece(key.key, key.module, key.expert, (shape[0], shape[1], shape[2]), lambda tensor: tensor.view(shape))


def _checked(source: AdapterSource, projection: str, a: list[Piece], b: list[Piece]) -> Projection:
    """Match the ranks of A and B and set the scalings."""
    by_expert = {piece.expert: piece for piece in a}
    split = projection == "gate_up" and len(b) == 1 and by_expert[a[0].expert].shape[1] == 2 * b[0].shape[2]
    for piece in b:
        partners = [by_expert[piece.expert]] if piece.expert in by_expert else a
        rank = piece.shape[2]
        source.check_rank(piece.key, rank, piece.module)
        for partner in partners:
            if partner.shape[1] != rank * (2 if split else 1):
                raise source.error(partner.key, f"{rank} rows, the rank of {piece.key} {list(piece.shape)}", list(source.shape(partner.key)))
        scalings = {source.config.scaling(rank, name) for name in ([piece.module] if piece.expert is not None else [partner.module for partner in partners])}
        if len(scalings) > 1:
            raise source.error(piece.key, "one alpha for all experts that share this B", sorted(scalings), "Give them one alpha_pattern.")
        piece.scaling = scalings.pop()
    return Projection(a, b, max(piece.shape[2] for piece in b), split)


# ---- plan: PEFT's flattened keys --------------------------------------------------------------------------------------
def _plan_flattened(source: AdapterSource, target: ExpertTarget, keys: dict[str, list[ExpertKey]]) -> dict[str, Projection]:
    """`experts.lora_A` alone, or with `experts.base_layer.lora_A` inside (which is gate_up_proj then)."""
    named = [name for name in keys if name not in (INNER, OUTER)]
    if named or OUTER not in keys:
        hint = "The file mixes layouts or lacks tensors; save the adapter again."
        raise source.error(next(iter(keys.values()))[0].key, f"{target.name}.lora_A and lora_B", f"{named or 'none'} beside it", hint)
    pairs: dict[str, tuple[str, str, str]] = {}
    for level, group in keys.items():
        halves = {key.half: key.key for key in group}
        for half, other in ("AB", "BA"):
            if half not in halves:
                raise missing_half(source, halves[other])
        a_shape, b_shape = source.shape(halves["A"]), source.shape(halves["B"])
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or a_shape[0] % target.num_experts:
            rows = f"[R * {target.num_experts}, in] and lora_B [out, R * {target.num_experts}]"
            raise source.error(halves["A"], rows, f"{list(a_shape)} and {list(b_shape)}", "The adapter was made for another base model.")
        outer_module = next(key.module for key in keys[OUTER])
        projection = "gate_up" if level == INNER else "down" if INNER in keys else _sole_parameter(source, target, halves["A"], halves["B"])
        pairs[projection] = (halves["A"], halves["B"], f"{outer_module}.{_LEAVES[projection]}")
    if not target.gated and "gate_up" in pairs:  # such a module's first parameter is up_proj
        a_key, b_key, name = pairs.pop("gate_up")
        pairs["up"] = (a_key, b_key, name.replace("gate_up_proj", "up_proj"))
    return _flattened(source, target, pairs)


def _sole_parameter(source: AdapterSource, target: ExpertTarget, a_key: str, b_key: str) -> str:
    """Which parameter a lone `experts.lora_A` belongs to: the one that target_parameters names, else the one whose shape fits."""
    names = {name.rpartition(".")[2] for name in source.config.target_parameters} & {"gate_up_proj", "up_proj", "down_proj"}
    if len(names) == 1:
        return "down" if names == {"down_proj"} else "gate_up"
    sizes = (source.shape(a_key)[1], source.shape(b_key)[0])
    fitting = [name for name in ("gate_up", "down") if sizes in (_sizes(target, name), _sizes(target, name)[::-1])]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise source.wrong_shape(a_key, _flattened_shapes(target, "gate_up") + " or " + _flattened_shapes(target, "down"))
    raise source.error(a_key, "one parameter in target_parameters", sorted(names), f"Name the parameter in {source.config.path.name}.")


def _flattened_shapes(target: ExpertTarget, projection: str) -> str:
    inputs, outputs = _sizes(target, projection)
    return f"[R * {target.num_experts}, {inputs}] with lora_B [{outputs}, R * {target.num_experts}]"


def _orientation(source: AdapterSource, target: ExpertTarget, projection: str, a_key: str, b_key: str) -> bool | None:
    """False: A spans the inputs. True: flipped, A spans the outputs (PEFT up to 0.18). None: square, the shapes cannot tell."""
    inputs, outputs = _sizes(target, projection)
    found = (source.shape(a_key)[1], source.shape(b_key)[0])
    if found not in ((inputs, outputs), (outputs, inputs)):
        raise source.wrong_shape(a_key if found[0] not in (inputs, outputs) else b_key, _flattened_shapes(target, projection))
    return None if inputs == outputs else found == (outputs, inputs)


def _flattened(source: AdapterSource, target: ExpertTarget, pairs: dict[str, tuple[str, str, str]]) -> dict[str, Projection]:
    """The projections of `pairs` (A, B, name that patterns address). Square ones lie as the layer's other one, else as metadata or PEFT version imply."""
    orientations = {name: _orientation(source, target, name, a_key, b_key) for name, (a_key, b_key, _) in pairs.items()}
    known = next((flipped for flipped in orientations.values() if flipped is not None), None)
    if known is None:
        layout = source.file.metadata.get("paramwrapper_layout")
        if layout in ("peft-0.18", "peft-0.19.1"):
            known = layout == "peft-0.18"
        else:  # PEFT wrote no version before 0.18, and flipped [E, out, in] parameters before 0.19
            known = not target.is_transposed and (source.config.peft_version or (0, 17)) < (0, 19)
            if source.config.peft_version is None:
                source.warn(
                    f"square expert matrices were read as {'[out, in]' if known else '[in, out]'}, because {source.config.path.name} has no peft_version"
                )
    flipped = {name: known if found is None else found for name, found in orientations.items()}
    return {name: _flattened_projection(source, target, name, pair, flipped[name]) for name, pair in pairs.items()}


def _flattened_projection(source: AdapterSource, target: ExpertTarget, projection: str, pair: tuple[str, str, str], flipped: bool) -> Projection:
    """A row e * R + j and B column j * E + e (rank-major) or e * R + j (grouped by expert) belong to rank j of expert e."""
    a_key, b_key, name = pair
    experts, (inputs, outputs) = target.num_experts, _sizes(target, projection)
    rank = source.shape(a_key)[0] // experts
    source.check_rank(a_key, rank, name)
    grouped = source.config.lora_b_layout == "grouped_by_expert"

    def rows(tensor: Tensor) -> Tensor:  # [E * R, x] -> [E, R, x]
        return tensor.view(experts, rank, -1)

    def columns(tensor: Tensor) -> Tensor:  # [x, R * E] -> [E, R, x]
        return tensor.view(-1, experts, rank).permute(1, 2, 0) if grouped else tensor.view(-1, rank, experts).permute(2, 1, 0)

    a_from, a_view, b_from, b_view = (b_key, columns, a_key, rows) if flipped else (a_key, rows, b_key, columns)
    a = Piece(a_from, name, None, (experts, rank, inputs), a_view)
    b = Piece(b_from, name, None, (experts, outputs, rank), lambda tensor: b_view(tensor).transpose(1, 2), source.config.scaling(rank, name))
    return Projection([a], [b], rank)


# ---- fill: read each tensor once and copy it to its place --------------------------------------------------------------
def _fill(
    source: AdapterSource, target: ExpertTarget, parts: list[tuple[list[Piece], int]], rows: int, cols: int, reference: float = 0.0, order: Tensor | None = None
) -> Tensor:
    """[E, rows, cols], or [1, rows, cols] where all experts share them, of pieces with the row that each list of them begins at.

    B pieces are multiplied by scaling / `reference`, the one that is kept for all experts, and their rows taken in `order`.
    """
    shared = all(piece.shared for pieces, _ in parts for piece in pieces)
    out = torch.zeros(1 if shared else target.num_experts, rows, cols, dtype=source.dtype)
    for piece, row in ((piece, row) for pieces, row in parts for piece in pieces):
        tensor = piece.transform(source.file.read(piece.key))
        if order is not None:
            tensor = tensor[:, order]
        if reference and piece.scaling != reference:
            tensor = tensor.float() * (piece.scaling / reference)
        place = out if piece.expert is None else out[piece.expert : piece.expert + 1]
        place[:, row : row + tensor.shape[1], : tensor.shape[2]].copy_(tensor)
    return out


def _fill_w13(source: AdapterSource, target: ExpertTarget, parts: dict[str, Projection]) -> tuple[Tensor, Tensor, bool, float]:
    """(a13, b13, split_a, scaling13) from gate_up, or from gate and up (either may be missing)."""
    rank, scaling = max(part.rank for part in parts.values()), max((piece.scaling for part in parts.values() for piece in part.b), key=abs)
    if "gate_up" in parts:
        part, rows = parts["gate_up"], torch.arange(target.w13_rows)
        order = torch.cat([rows[0::2], rows[1::2]]) if target.interleaved_gate_up else None
        a13 = _fill(source, target, [(part.a, 0)], part.a[0].shape[1] if part.split else rank, target.hidden)
        return a13, _fill(source, target, [(part.b, 0)], target.w13_rows, rank, scaling, order), part.split, scaling
    b_parts = [(part.b, target.intermediate if name == "up" and target.gated else 0) for name, part in parts.items()]
    b13 = _fill(source, target, b_parts, target.w13_rows, rank, scaling)
    split = len(parts) == 2 and not _same_a(source, parts["gate"], parts["up"])
    a_parts = [(parts["gate"].a, 0), (parts["up"].a, rank)] if split else [(next(iter(parts.values())).a, 0)]
    return _fill(source, target, a_parts, 2 * rank if split else rank, target.hidden), b13, split, scaling


def _same_a(source: AdapterSource, gate: Projection, up: Projection) -> bool:
    """Whether gate and up share one A, as shared-outer files write it twice; then it is stored and multiplied once."""
    if not (gate.a[0].shared and up.a[0].shared and gate.a[0].shape == up.a[0].shape):
        return False
    return torch.equal(source.file.read(gate.a[0].key).flatten(), source.file.read(up.a[0].key).flatten())


# ---- shared experts ----------------------------------------------------------------------------------------------------
def join_shared(target: ExpertTarget, routed: ExpertLoRA | None, own: ExpertLoRA | None = None) -> ExpertLoRA:
    """Adapters of all experts of `target` from those `routed` to its routed experts and its shared one's `own`, read as `of_files` has them."""
    if target.shared is None:
        return routed or ExpertLoRA()
    first, w13, w2 = target.num_experts - target.shared.parts, [], []
    for lora, experts, parts in ((routed, slice(0, first), 1), (own, slice(first, None), target.shared.parts)):
        if lora is not None and lora.a13 is not None and lora.b13 is not None:
            rank = lora.b13.shape[2]
            b = lora.b13.view(-1, 2, parts, target.intermediate, rank).transpose(1, 2).flatten(0, 1)
            w13.append((experts, lora.a13.view(len(lora.a13), -1, rank, target.hidden), b, lora.scaling13))
        if lora is not None and lora.a2 is not None and lora.b2 is not None:
            a = lora.a2.view(len(lora.a2), -1, parts, target.intermediate).transpose(1, 2).flatten(0, 1)
            w2.append((experts, a.unsqueeze(1), lora.b2.unsqueeze(1), lora.scaling2))
    (a13, b13, scaling13), (a2, b2, scaling2) = (_join(target.num_experts, blocks) for blocks in (w13, w2))
    return ExpertLoRA(a13, b13, any(a.shape[1] == 2 for _, a, _, _ in w13), scaling13, a2, b2, scaling2)


def _join(num_experts: int, blocks: list[tuple[slice, Tensor, Tensor, float]]) -> tuple[Tensor | None, Tensor | None, float]:
    """Blocks (experts, A [n or 1, c or 1, R, in], B [n or 1, g, rows, R], scaling) -> A [E, c * R, in], B [E, g * rows, R], scaling; zeros elsewhere."""
    if not blocks:
        return None, None, 0.0
    (_, a, b, _), scaling = blocks[0], max((block[3] for block in blocks), key=abs)
    rank, split = max(block[2].shape[3] for block in blocks), max(block[1].shape[1] for block in blocks)
    all_a, all_b = a.new_zeros(num_experts, split, rank, a.shape[3]), b.new_zeros(num_experts, *b.shape[1:3], rank)
    for experts, a, b, own in blocks:
        all_a[experts, :, : a.shape[2]] = a
        all_b[experts, ..., : b.shape[3]] = b if own == scaling else b.float() * (own / scaling)
    return all_a.flatten(1, 2), all_b.flatten(1, 2), scaling
