"""Which linears and experts of one checkpoint are quantized, and how.

config.json says how; the files say which, because some tools leave modules in 16 bit without listing them. Without files
(dummy weights) everything that config.json covers is quantized. While loading, the tensors of a quantized linear are
collected here, from whatever order and files they come in, until all are there.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sglang_lora_moe.layers.linear import Linear
from sglang_lora_moe.models.places import Piece, Place, QuantizedPlace
from sglang_lora_moe.moe.spec import MoESpec
from sglang_lora_moe.quantization.config import QuantizationConfig
from sglang_lora_moe.quantization.linear import QuantizedLinear
from sglang_lora_moe.quantization.wna16 import TENSORS, QuantizationError, WNA16Scheme

logger = logging.getLogger(__name__)

ExpertsScheme = tuple[WNA16Scheme, WNA16Scheme]  # of gate_up and of down
_SUFFIXES = frozenset(suffix for suffixes in TENSORS.values() for suffix in suffixes)


class WeightFormats:
    """`tensors` are the names of the files' tensors, None without files; `place_of` gives the model's name for one of the files'."""

    def __init__(self, config: QuantizationConfig | None, tensors: Iterable[str] | None, place_of: Callable[[str], tuple[str, Piece | None]]) -> None:
        self.config, self._by_files = config, tensors is not None
        self._tensors: dict[str, set[str]] = {}  # quantized linear, as the files name it -> its tensors there
        self._places: dict[str, tuple[str, Piece | None]] = {}  # the same -> where it belongs
        self._names: dict[tuple[str, Piece | None], str] = {}  # and back
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._dequantized: list[str] = []
        for key in tensors if tensors is not None and config is not None else ():
            name, _, suffix = key.rpartition(".")
            if suffix in _SUFFIXES:
                self._tensors.setdefault(name, set()).add(suffix)
        for name in self._tensors:
            # transformers' rules are for weights: they would rename quantized tensors wrongly, or not at all.
            place = self._places[name] = place_of(f"{name}.weight")
            self._names[place] = name

    def make_linear(self, modules: dict[str, nn.Linear], *, device: torch.device | str, slot_source: str = "tokens") -> Linear:
        """The layer for one linear or several fused ones. One that is only partly quantized is built in 16 bit and dequantized at load."""
        schemes = {name: self._scheme((f"{name}.weight", None), name) for name in modules}
        distinct: dict[WNA16Scheme, str] = {}
        for name, scheme in schemes.items():
            if scheme is not None:
                distinct.setdefault(scheme, name)
        if len(distinct) > 1:
            found = ", ".join(f"{name} is {scheme}" for scheme, name in distinct.items())
            raise QuantizationError(f"these are computed as one projection, but quantized differently: {found}; quantize them alike")
        if not distinct or None in schemes.values():
            return Linear.from_modules(modules, device=device, slot_source=slot_source)
        return QuantizedLinear.from_modules(modules, device=device, slot_source=slot_source, scheme=next(iter(distinct)))

    def experts_scheme(self, path: str, spec: MoESpec) -> ExpertsScheme | None:
        """(gate_up's, down's): the schemes of all experts at `path`; None = 16 bit. They may differ in bits and groups."""
        if self.config is None:
            return None
        found: tuple[dict[WNA16Scheme | None, str], dict[WNA16Scheme | None, str]] = {}, {}  # scheme -> the first linear that has it
        for place, piece, name in _expert_linears(path, spec):
            found[place.endswith(".down_proj")].setdefault(self._scheme((place, piece), name), name)
        first, down = (next(iter(schemes)) for schemes in found)
        if max(map(len, found)) == 1 and first is not None and down is not None:
            return first, down
        if not any(scheme for schemes in found for scheme in schemes):
            return None
        mixed = ", ".join(f"{name} is {scheme or 'not quantized, or missing'}" for schemes in found for scheme, name in schemes.items())
        raise QuantizationError(
            f"{path}: the gate and up projections of all experts of a layer must be quantized alike, and so must the down projections, but {mixed}; "
            "quantize them alike, or except all experts of the layer"
        )

    def is_stored_as(self, experts: ExpertsScheme | None, shared: str) -> bool:
        """Whether the linears of the shared expert `shared` are stored as `experts` of its layer are, so that they can be more of them."""
        first, down = experts or (None, None)
        found = [self._scheme((f"{shared}.{leaf}.weight", None), f"{shared}.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")]
        return found == [first, first, down] and (down is None or down.group_size > 0)  # one scale for a whole row could not be shared out

    def _scheme(self, place: tuple[str, Piece | None], name: str) -> WNA16Scheme | None:
        """The scheme of the linear that belongs at `place` and that the model calls `name`; None = 16 bit."""
        if self.config is None:
            return None
        if not self._by_files:
            return self.config.scheme_for(name) if self.config.covers_by_default(name) else None
        in_files = self._names.get(place)
        return None if in_files is None else self._file_scheme(in_files, name)

    def _file_scheme(self, in_files: str, *names: str) -> WNA16Scheme:
        assert self.config is not None
        scheme = self.config.scheme_for(in_files, *names)
        if scheme is None:
            tensor = f"{in_files}.{min(self._tensors[in_files])}"
            raise QuantizationError(f"{tensor} is in the files, but quantization_config excepts {in_files} from quantization; correct config.json")
        return scheme

    def is_quantized(self, key: str) -> bool:
        """Whether the tensor `key` is part of a quantized linear."""
        name, _, suffix = key.rpartition(".")
        return suffix in self._tensors.get(name, ())

    def put(self, opened: Any, key: str, places: dict[str, Place]) -> bool:
        """Keep the tensor `key` until all of its linear are there, and put them into their place then. False = it has none."""
        name, _, suffix = key.rpartition(".")
        place, piece = self._places[name]
        if place not in places:
            return False
        tensors = self._pending.setdefault(name, {})
        tensors[suffix] = opened.get_tensor(key)
        if tensors.keys() == self._tensors[name]:
            places[place].put_quantized(name, tensors, piece, self._file_scheme(name, place.removesuffix(".weight")))
            if not isinstance(places[place], QuantizedPlace):
                self._dequantized.append(name)
            del self._pending[name]
        return True

    def why_unused(self, keys: list[str]) -> str:
        """What to say of tensors without a place, where they are of quantized linears that nothing declares."""
        undeclared = self.config is None and any(key.rpartition(".")[2] in _SUFFIXES for key in keys)
        return "; they are of quantized weights, but config.json has no quantization_config" if undeclared else ""

    def is_idle_bias(self, opened: Any, key: str) -> bool:
        """GPTQ tools write a bias of zeros beside linears that have none."""
        name, _, suffix = key.rpartition(".")
        return suffix == "bias" and name in self._tensors and not opened.get_tensor(key).any()

    def log_dequantized(self) -> None:
        if self._dequantized:
            shown = ", ".join(self._dequantized[:3]) + ", ..." * (len(self._dequantized) > 3)
            logger.info("dequantized to 16 bit at load, as parts of layers that are not quantized as a whole: %d linears (%s)", len(self._dequantized), shown)


def _expert_linears(path: str, spec: MoESpec) -> Iterator[tuple[str, Piece, str]]:
    """(parameter, piece, name of its own) of every linear of the experts at `path`."""
    first = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    for expert in range(spec.num_experts):
        for part, leaf in enumerate(first):
            yield f"{path}.{'gate_up_proj' if spec.gated else 'up_proj'}", (expert, part), f"{path}.{expert}.{leaf}"
        yield f"{path}.down_proj", (expert, 0), f"{path}.{expert}.down_proj"
