"""The tensors of a LoRA file, sorted by the module of the base model and by their role in it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import Problem, ProblemCode
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import shown
from adapters.peft.earlier_names import EarlierNames, ExpertTensor
from adapters.peft.files import CONFIG_FILE
from adapters.peft.lora_config import LoraSettings
from adapters.peft.lora_forms import LoraForm
from adapters.peft.patterns import dotted_suffixes
from adapters.peft.safetensors_header import FLOAT_BYTES, TensorInfo, read_header, stored_bytes
from adapters.peft.spellings import peft_names, repeated
from adapters.peft.targets import some_of
from adapters.peft.tensor_names import TensorKind, parse_tensor_name

KINDS: dict[str, str] = {
    "A": "lora_A",
    "B": "lora_B",
    "lora_bias": "bias of lora_B",
    "magnitude": "lora_magnitude_vector",
    "base_bias": "trained bias",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}
_BASE_LAYER = ".base_layer"
_WRAPPERS = (".modules_to_save", ".original_module", ".token_adapter")
Names = dict[TensorKind, str]
ExpertNames = dict[ExpertTensor, str]


@dataclass(slots=True)
class LoraTensors:
    """Names of tensors by module and kind.

    `modules` has the factors of linears, and of modules that the base model lacks. `embeddings` is for the input
    embedding. `stacked` has factors of parameters, by module and by the nesting depth of PEFT's wrapper. `experts` has
    those of single experts, by module and parameter, from before transformers fused them. `saved` has whole
    parameters, `biases` trained biases of linears that are not adapted, `tokens` rows of embeddings.

    Where the vocabulary was resized, PEFT writes whole wrappers: `copies` lists duplicates of saved parameters and
    `unused` the weights that they replaced, as (module, parameter, tensor). `notes` are sentences for the report.
    """

    path: Path
    infos: dict[str, TensorInfo]
    modules: dict[str, Names] = field(default_factory=dict)
    embeddings: dict[str, Names] = field(default_factory=dict)
    stacked: dict[str, dict[int, Names]] = field(default_factory=dict)
    experts: dict[str, dict[str, ExpertNames]] = field(default_factory=dict)
    saved: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[str, str, str]] = field(default_factory=list)
    unused: list[tuple[str, str, str]] = field(default_factory=list)
    misnamed: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, spec: ModelSpec, form: LoraForm | None = None) -> "LoraTensors":
        """Read the header of the file at `path` and sort its tensors, whose names are those of `form`. Raises
        `AdapterInvalid` if it is not a safetensors file."""
        tensors = cls(path, read_header(path, FLOAT_BYTES))
        spellings = peft_names(tensors.infos, spec.modules.keys() | spec.parameters.keys())
        again = repeated(spellings.names)
        tensors.notes += [*spellings.notes, *rounding_notes(tensors.infos)]
        earlier, renamed = EarlierNames(spec), 0
        for name, own in spellings.names.items():
            if name in again:
                found = f"another spelling of {shown(again[name], 200)}"
                tensors.misnamed.append(problem(name, found, "each tensor once", "malformed_file"))
            elif (lora := own if form is None else form.lora_name(own)) is not None:
                current = earlier.current(lora)
                renamed += current != lora
                tensors._place(name, current, spec)
            else:
                tensors.misnamed.append(problem(name, "a tensor of another kind", "those of the config's type"))
        if renamed:
            tensors.notes.append(f"the names of {renamed} tensors are those of an earlier transformers")
        for module, parameter, name in list(tensors.copies):
            if tensors.saved.setdefault(module, {}).setdefault(parameter, name) == name:
                tensors.copies.remove((module, parameter, name))  # not a duplicate: the only tensor of the parameter
        for module in tensors.saved.keys() & tensors.biases.keys():  # the module is saved as a whole, with its bias
            tensors.saved[module]["bias"] = tensors.biases.pop(module)
        return tensors

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes, once they are loaded."""
        return sum(map(stored_bytes, self.infos.values()))

    def touched(self) -> set[str]:
        """Return every module that the adapter changes."""
        kinds = (self.modules, self.embeddings, self.stacked, self.experts, self.saved, self.biases, self.tokens)
        return set().union(*kinds)

    def adapted(self) -> set[str]:
        """Return the modules that PEFT wraps, a subset of `touched`."""
        return self.modules.keys() | self.embeddings.keys() | self.stacked.keys() | self.experts.keys()

    def vocab_size(self, spec: ModelSpec) -> int | None:
        """Return the number of rows of the adapter's own embedding or head where it differs from the base's, else
        None."""
        names = [self.saved.get(module, {}).get("weight") for module in (spec.embedding, spec.head)]
        sizes = {self.infos[name].shape[0] for name in names if name} - {spec.vocab_size}
        return max(sizes) if sizes else None

    def _place(self, name: str, current: str | ExpertTensor, spec: ModelSpec) -> None:
        if isinstance(current, str):
            self._sort(name, current, spec)
            return
        places = self.experts.setdefault(current.module, {}).setdefault(current.parameter, {})
        if places.setdefault(current, name) != name:
            self.misnamed.append(problem(name, "a second one of its expert", "one", "malformed_file"))

    def _sort(self, name: str, own: str, spec: ModelSpec) -> None:
        """Sort the tensor `name`, which PEFT would call `own`."""
        parsed = parse_tensor_name(own)
        if parsed is None:
            self.misnamed.append(problem(name, "no tensor of a LoRA", "base_model.model.<module>.lora_A.weight"))
            return
        module, kind = parsed
        bare = module.replace(_BASE_LAYER, "")
        if kind == "parameter" or (kind == "bias" and module not in spec.modules):
            self._sort_parameter(name, own.rpartition(".")[2], bare, spec)
        elif kind == "bias":
            self.biases[module] = name
        elif kind == "tokens":
            self.tokens[module] = name
        elif kind.startswith("embedding") or (kind == "magnitude" and module == spec.embedding):
            self._put(self.embeddings.setdefault(module, {}), kind, name)
        elif kind in ("A", "B") and bare not in spec.modules and bare in spec.parameters:
            depth = module.count(_BASE_LAYER)
            self._put(self.stacked.setdefault(bare, {}).setdefault(depth, {}), kind, name)
        else:
            self._put(self.modules.setdefault(module, {}), kind, name)

    def _sort_parameter(self, name: str, parameter: str, module: str, spec: ModelSpec) -> None:
        wrapper = next((wrapper for wrapper in _WRAPPERS if module.endswith(wrapper)), "")
        module = module.removesuffix(wrapper)
        if parameter not in spec.parameters.get(module, {}):
            expected = "tensors of a LoRA, or parameters of the base model that see every token and are not quantised"
            self.misnamed.append(problem(name, "neither", expected))
        elif wrapper == ".modules_to_save":
            self.copies.append((module, parameter, name))
        elif wrapper == ".original_module":
            self.unused.append((module, parameter, name))
        elif self.saved.setdefault(module, {}).setdefault(parameter, name) != name:
            self.misnamed.append(problem(name, "a second one of its module", "one", "malformed_file"))

    def _put(self, names: Names, kind: TensorKind, name: str) -> None:
        if names.setdefault(kind, name) != name:
            self.misnamed.append(problem(name, f"a second {KINDS[kind]} of its module", "one", "malformed_file"))


def targeted_parameters(module: str, settings: LoraSettings, spec: ModelSpec) -> list[str]:
    """Return the parameters of `module` that `target_parameters` names, in the order in which PEFT wraps them: the
    last is outermost."""
    suffixes = settings.target_parameters
    names = [(name, f"{module}.{name}") for name in parameter_names(module, spec)]
    return [name for name, full in names if any(full == s or full.endswith(f".{s}") for s in suffixes)]


def parameter_names(module: str, spec: ModelSpec) -> list[str]:
    """Return the parameters of `module` that can have factors, including the weight of a quantised linear."""
    own = list(spec.parameters.get(module, ()))
    return own if "weight" in own or module not in spec.modules else [*own, "weight"]


def parameter_factors(
    module: str, names: dict[int, Names], settings: LoraSettings, spec: ModelSpec
) -> Iterator[tuple[str, Names]]:
    """Yield each targeted parameter of `module` with the names of its factors; `names` has them by wrapper depth."""
    targeted = targeted_parameters(module, settings, spec)
    for depth, own in names.items():
        if depth < len(targeted):
            yield targeted[-1 - depth], own


def expert_ranks(tensors: LoraTensors, settings: LoraSettings) -> Iterator[int]:
    """Yield the ranks of single experts' factors; the rank of their parameter is that of its parts together."""
    for module, parameters in tensors.experts.items():
        for parameter, names in parameters.items():
            yield settings.rank(f"{module}.{parameter}") // next(iter(names)).parts


def factor_shapes(
    module: str, parameter: str, rank: int, spec: ModelSpec
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the shapes of A and B for a parameter `[out, in]` or stacked experts `[experts, out, in]`; None for any
    other number of dimensions."""
    shape = spec.parameters[module][parameter]
    if len(shape) == 2:
        return (rank, shape[1]), (shape[0], rank)
    if len(shape) != 3:
        return None
    experts, outputs, inputs = shape
    if module in spec.transposed:
        outputs, inputs = inputs, outputs
    return (rank * experts, inputs), (outputs, rank * experts)


def rank_of(module: str, settings: LoraSettings, spec: ModelSpec) -> int:
    """Return the rank that the config declares for `module`."""
    return settings.rank(_pattern_key(module, settings, spec))


def scaling_of(module: str, settings: LoraSettings, spec: ModelSpec) -> float:
    """Return the scaling that the config declares for `module`."""
    return settings.scaling(_pattern_key(module, settings, spec))


def _pattern_key(module: str, settings: LoraSettings, spec: ModelSpec) -> str:
    """Return the name that PEFT matches patterns against: a linear targeted by its parameter has the parameter's
    name."""
    targets = settings.target_modules
    by_module = targets is None or not set(targets).isdisjoint(dotted_suffixes(module))
    parameters = [] if by_module else targeted_parameters(module, settings, spec)
    return f"{module}.{parameters[-1]}" if parameters else module


def token_target(module: str, settings: LoraSettings, spec: ModelSpec) -> tuple[str | None, tuple[int, ...]]:
    """Return the key of `trainable_token_indices` that applies to `module`, and its tokens; None and () if there is
    none. A tied head has those of the embedding."""
    for target, ids in settings.token_indices.items():
        if names_module(target, module) or (not target and module == spec.embedding):
            return target, ids
    return token_target(spec.embedding, settings, spec) if spec.tied and module == spec.head else (None, ())


def names_module(target: str, module: str) -> bool:
    """Return True if `target` is `module` or a dotted ending of it."""
    return target in dotted_suffixes(module)


def shares_weight(spec: ModelSpec, settings: LoraSettings) -> bool:
    """Return True if a weight of the embedding or the head is loaded into the one parameter that both share. A
    module in `modules_to_save` has a copy of its own instead."""
    ends = (spec.embedding, spec.head)
    return spec.tied and not any(names_module(target, end) for target in settings.modules_to_save for end in ends)


def problem(where: str, found: str, expected: str, code: ProblemCode = "unsupported_feature") -> Problem:
    """Build a problem with an untrusted `where`, shortened to 200 characters of printable ASCII."""
    return Problem(shown(where, 200), found, expected, code)


def rounding_notes(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return the sentence of the report about tensors that are rounded."""
    count = sum(info.dtype == "F64" for info in infos.values())
    return [f"{count} tensors in float64 were rounded to float32"] if count else []


def rank_of_module(module: str) -> str:
    """Return the location of a problem with the rank of `module`, which names the flag of the limit."""
    return f"{CONFIG_FILE}: rank of {module} (--max-adapter-rank)"


def lost_modules(modules: Collection[str]) -> Problem:
    """Build the problem of targeted modules that the file has no tensors for."""
    plural = "module" if len(modules) == 1 else "modules"
    found = f"{len(modules)} targeted {plural} without tensors: {some_of(modules)}"
    return problem(f"{CONFIG_FILE}: target_modules", found, "tensors for every module that PEFT wraps", "no_target")
