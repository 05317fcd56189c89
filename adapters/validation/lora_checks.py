"""Checks of a LoRA against a base model: they report every problem, with the tensor or the key."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.errors import Problem
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import shown
from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.peft.lora_config import LoraSettings
from adapters.peft.lora_tensors import (
    KINDS,
    LoraTensors,
    factor_shapes,
    lost_modules,
    parameter_factors,
    parameter_names,
    problem,
    rank_of,
    rank_of_module,
    scaling_of,
    shares_weight,
    targeted_parameters,
)
from adapters.peft.patterns import dotted_suffixes
from adapters.peft.targets import unmatched
from adapters.peft.tensor_bytes import largest_finite
from adapters.peft.tensor_names import TensorKind
from adapters.validation.expert_checks import ExpertChecks
from adapters.validation.saved_checks import copy_problems, token_problems, whole_problems

MAX_STACKED_BYTES = 1 << 30  # size in float32 of all parameters of which the adapter needs a changed copy
_FACTORS: tuple[TensorKind, ...] = ("A", "B")
_EMBEDDING_FACTORS: tuple[TensorKind, ...] = ("embedding_A", "embedding_B")
_SCALED: tuple[TensorKind, ...] = ("B", "lora_bias", "embedding_B")


@dataclass(frozen=True, slots=True)
class LoraChecks:
    """The checks of one file. Without settings (an unreadable config), only those that do not depend on them."""

    tensors: LoraTensors
    spec: ModelSpec

    def problems(self, settings: LoraSettings | None, magnitudes: Mapping[str, float] | None = None) -> list[Problem]:
        """Return every problem. `magnitudes` are the largest absolute values of all tensors; without them, numbers are
        not checked, and copies not compared."""
        found = [*self.tensors.misnamed, *self._modules()]
        if settings:
            found += [*self._targets(settings), *self._saved_targets(settings), *self._sizes(settings)]
            found += [*self._vectors(settings), *self._biases(settings), *self._embedding(settings)]
            found += [
                *self._stacked(settings),
                *ExpertChecks(self.tensors, self.spec, settings).problems(),
                *token_problems(self.tensors, self.spec, settings),
                *self._invocation(settings),
            ]
            if settings.whole_targets is not None:
                found += whole_problems(self.tensors, self.spec, settings.whole_targets)
        found += [*self._saved(), *self._vocabulary(settings)]
        if magnitudes is not None:
            found += [*copy_problems(self.tensors), *self._numbers(settings, magnitudes)]
        return found

    # -- which modules -------------------------------------------------------------------------------------------

    def _modules(self) -> Iterator[Problem]:
        known = self.tensors.touched() - (self.tensors.modules.keys() - self.spec.modules.keys())
        if not known:
            example = next(iter(self.spec.modules), "none")
            yield problem(WEIGHTS_FILE, "no module of the base model", f"modules such as {example}", "no_target")
            return
        for module, names in self.tensors.modules.items():
            present = next(iter(names.values()))
            if module not in self.spec.modules:
                yield problem(present, "a module the base model lacks", "one it has", "base_mismatch")
            missing = [KINDS[kind] for kind in _FACTORS if kind not in names]
            if missing:
                yield problem(present, f"no {' and no '.join(missing)} beside it", "both factors", "shape_mismatch")

    def _targets(self, settings: LoraSettings) -> Iterator[Problem]:
        """Yield every declared target without a tensor, and every tensor that PEFT would drop because its module is
        no target."""
        if settings.target_modules is None:
            yield from self._moved(settings)
            yield from self._lost(settings, set())
            return
        declared = set(settings.target_modules)
        reached = set()
        for module, names in (self.tensors.modules | self.tensors.embeddings).items():
            suffixes = declared & self._known_as(module, settings)
            reached |= suffixes
            is_target = module in declared or (suffixes and settings.reaches(module))
            if (not is_target or settings.leaves_out(module)) and not targeted_parameters(module, settings, self.spec):
                yield problem(next(iter(names.values())), "a module beyond them", "only targeted modules", "no_target")
        missing = declared - reached - self._left_out(settings)
        for target in sorted(missing - set(self.unmatched(settings) if missing else ())):
            yield _missing_target("target_modules", target)
        yield from self._lost(settings, declared - reached)

    def _moved(self, settings: LoraSettings) -> Iterator[Problem]:
        """Yield every tensor of a linear with the name of a target that PEFT looks for among the parameters."""
        for module, names in self.tensors.modules.items():
            if settings.targets is not None and settings.targets.has_moved(module):
                yield problem(next(iter(names.values())), "a module beyond them", "only targeted modules", "no_target")

    def unmatched(self, settings: LoraSettings) -> list[str]:
        """Return the targets that no module of the base model has, which PEFT ignores beside others that match."""
        whole = settings.whole_targets
        names = settings.target_modules if whole is None else whole.names
        return unmatched(names or (), self.spec.names)

    def _lost(self, settings: LoraSettings, unreached: set[str]) -> Iterator[Problem]:
        """Yield one problem for the modules that PEFT wraps and the file has no tensors for. Modules of the targets
        `unreached` alone are left to the problems of these targets."""
        adapted, spec = self.tensors.adapted(), self.spec
        if settings.targets is None or not adapted:
            return
        lost = settings.targets.wrapped(spec.modules, spec.embedding, spec.head) - adapted
        if settings.ensures_tying and spec.tied and not adapted.isdisjoint((spec.embedding, spec.head)):
            lost -= {spec.embedding, spec.head}  # both have the adapter of one of them
        if settings.target_modules is not None:
            reached = set(settings.target_modules) - unreached
            lost = {module for module in lost if not reached.isdisjoint(dotted_suffixes(module))}
        if lost:
            yield lost_modules(lost)

    def _left_out(self, settings: LoraSettings) -> set[str]:
        """Return the targets that match only modules that PEFT does not wrap."""
        left, kept = set[str](), set[str]()
        for module in (*self.spec.modules, self.spec.embedding):
            (left if settings.leaves_out(module) else kept).update(dotted_suffixes(module))
        return left - kept

    def _known_as(self, module: str, settings: LoraSettings) -> set[str]:
        ends = (self.spec.embedding, self.spec.head)
        tied = settings.ensures_tying and self.spec.tied and module in ends
        return {suffix for name in (ends if tied else (module,)) for suffix in dotted_suffixes(name)}

    def _saved_targets(self, settings: LoraSettings) -> Iterator[Problem]:
        """Check that the file has the targets of `modules_to_save` and `target_parameters`."""
        saved = [f".{module}." for module in self.tensors.saved]
        for target in settings.modules_to_save if settings.whole_targets is None else ():
            if not any(f".{target}." in module for module in saved):
                yield _missing_target("modules_to_save", target)
        adapted = self.tensors.stacked.keys() | self.tensors.modules.keys() | self.tensors.experts.keys()
        parameters = [f".{module}.{name}" for module in adapted for name in parameter_names(module, self.spec)]
        for target in settings.target_parameters:
            if not any(name.endswith(f".{target}") for name in parameters):
                yield _missing_target("target_parameters", target)

    def _scalings(self, settings: LoraSettings) -> dict[str, float]:
        """Return the scaling of each scaled tensor, by tensor name."""
        adapted = {**self.tensors.modules, **self.tensors.embeddings}
        return {
            names[kind]: scaling_of(module, settings, self.spec)
            for module, names in adapted.items()
            if module in self.spec.parameters
            for kind in _SCALED
            if kind in names
        }

    def _numbers(self, settings: LoraSettings | None, magnitudes: Mapping[str, float]) -> Iterator[Problem]:
        """Yield a problem for every tensor with NaN or infinity, and for every tensor that would overflow its own
        dtype when multiplied by its scaling."""
        scalings = self._scalings(settings) if settings else {}
        for name, info in self.tensors.infos.items():
            if not math.isfinite(magnitudes[name]):
                yield problem(name, "NaN or infinity", "finite numbers", "nonfinite")
            elif magnitudes[name] * scalings.get(name, 1.0) > largest_finite(info.dtype):
                yield problem(name, "infinity once scaled by alpha", "finite numbers", "nonfinite")

    # -- linears -------------------------------------------------------------------------------------------------

    def _sizes(self, settings: LoraSettings) -> Iterator[Problem]:
        for module, names in self.tensors.modules.items():
            if module not in self.spec.modules:
                continue
            inputs, outputs = self.spec.modules[module]
            if module == self.spec.head:
                outputs = self.tensors.vocab_size(self.spec) or outputs
            rank = rank_of(module, settings, self.spec)
            yield from self._rank(module, rank)
            matrices = {"A": (rank, inputs), "B": (outputs, rank)}
            for kind, name in names.items():
                if kind == "A" and self._is_pooled(name, (rank, inputs), settings):
                    continue
                yield from self._shape(name, matrices.get(kind, (outputs,)))

    def _is_pooled(self, name: str, full: tuple[int, int], settings: LoraSettings) -> bool:
        """Return True if a QA-LoRA was trained on a base that pools the input; on other bases PEFT trains plain
        factors."""
        size = settings.qalora_group_size
        if size is None or full[1] % size:
            return False
        return self.tensors.infos[name].shape == (full[0], full[1] // size)

    def _rank(self, module: str, rank: int) -> Iterator[Problem]:
        if rank > self.spec.max_rank:
            yield problem(rank_of_module(module), str(rank), f"at most {self.spec.max_rank}", "rank_too_large")

    def _shape(self, name: str, expected: tuple[int, ...]) -> Iterator[Problem]:
        shape = self.tensors.infos[name].shape
        if shape != expected:
            yield problem(name, str(list(shape)), str(list(expected)), "shape_mismatch")

    def _vectors(self, settings: LoraSettings) -> Iterator[Problem]:
        """Check that an adapted module has exactly the vectors that the config declares."""
        for module, names in self.tensors.modules.items():
            if module not in self.spec.modules or not names.keys() & set(_FACTORS):
                continue
            has_bias = settings.bias != "none" and module in self.spec.biased
            declared: dict[TensorKind, bool] = {
                "magnitude": settings.use_dora,
                "lora_bias": settings.lora_bias,
                "base_bias": has_bias,
            }
            yield from self._declared(names, declared)

    def _declared(self, names: dict[TensorKind, str], declared: dict[TensorKind, bool]) -> Iterator[Problem]:
        for kind, wanted in declared.items():
            if wanted and kind not in names:
                present = next(iter(names.values()))
                yield problem(present, f"no {KINDS[kind]} beside it", "all that is declared", "shape_mismatch")
            elif kind in names and not wanted:
                yield problem(names[kind], f"a {KINDS[kind]}", "only what the config and the base model have")

    def _biases(self, settings: LoraSettings) -> Iterator[Problem]:
        """Check that `bias="all"` comes with every bias that does not belong to an adapted linear, and any other
        setting with none."""
        wraps = self.tensors.adapted()
        wanted = (self.spec.biased if settings.bias == "all" else frozenset()) - wraps - self.tensors.saved.keys()
        for module, name in self.tensors.biases.items():
            if module in wanted:
                yield from self._shape(name, (self.spec.modules[module][1],))
            else:
                yield problem(name, "a trained bias", 'with bias="all", those of layers that are not adapted')
        for module in sorted(wanted - self.tensors.biases.keys()):
            yield problem(f"{WEIGHTS_FILE}: {module}", "no bias", 'one, as bias="all" declares', "shape_mismatch")

    # -- everything else -----------------------------------------------------------------------------------------

    def _saved(self) -> Iterator[Problem]:
        """Check names and shapes of whole parameters. PEFT looks for the weight of a layer that it wraps under
        `base_layer`, and of no other layer."""
        for module, names in self.tensors.saved.items():
            for parameter, name in names.items():
                expected = self.spec.parameters[module][parameter]
                wrapped = module in self.tensors.adapted() | self.tensors.tokens.keys()
                if (".base_layer." in name) != wrapped:
                    yield problem(name, "a name that PEFT would not look for", "base_layer in adapted layers only")
                elif module in (self.spec.embedding, self.spec.head) and parameter == "weight":
                    yield from self._shape(name, (self.tensors.infos[name].shape[0], *expected[1:]))
                else:
                    yield from self._shape(name, expected)

    def _vocabulary(self, settings: LoraSettings | None) -> Iterator[Problem]:
        """Check that an adapter with its own vocabulary has both ends of it, and nothing that is tied to the base's
        vocabulary."""
        size = self.tensors.vocab_size(self.spec)
        if size is None:
            return
        for module in (self.spec.embedding, self.spec.head):
            name = self.tensors.saved.get(module, {}).get("weight")
            if name is None and not (settings and shares_weight(self.spec, settings)):
                where = f"{WEIGHTS_FILE}: {module}"
                yield problem(where, "no weight", f"one with {size} rows, as the other end has", "shape_mismatch")
            elif name is not None and self.tensors.infos[name].shape[0] != size:
                yield from self._shape(name, (size, *self.tensors.infos[name].shape[1:]))
            vectors = {**self.tensors.modules.get(module, {}), **self.tensors.embeddings.get(module, {})}
            for kind in vectors.keys() - {"A", "B", "embedding_A", "embedding_B"}:
                yield problem(vectors[kind], f"a {KINDS[kind]} with a changed vocabulary", "factors and weights alone")

    def _embedding(self, settings: LoraSettings) -> Iterator[Problem]:
        for module, names in self.tensors.embeddings.items():
            if module != self.spec.embedding:
                yield problem(next(iter(names.values())), "no embedding of the base model", self.spec.embedding)
                continue
            _, hidden = self.spec.parameters[module]["weight"]
            vocab = self.tensors.vocab_size(self.spec) or self.spec.vocab_size or 0
            rank = settings.rank(module)
            yield from self._rank(module, rank)
            wanted: dict[TensorKind, bool] = dict.fromkeys(_EMBEDDING_FACTORS, True)
            yield from self._declared(names, {**wanted, "magnitude": settings.use_dora})
            shapes = {"embedding_A": (rank, vocab), "embedding_B": (hidden, rank)}
            for kind, name in names.items():
                yield from self._shape(name, shapes.get(kind, (hidden,)))

    def _stacked(self, settings: LoraSettings) -> Iterator[Problem]:
        nbytes = 0
        for module, depths in self.tensors.stacked.items():
            targeted = targeted_parameters(module, settings, self.spec)
            if sorted(depths) != list(range(len(targeted))):
                where = next(iter(depths[max(depths)].values()))
                expected = f"factors of the {len(targeted)} parameters that target_parameters names"
                yield problem(where, f"those of {len(depths)}", expected, "no_target")
                continue
            if settings.use_dora or settings.lora_bias:
                where = next(iter(depths[0].values()))
                yield problem(where, "DoRA or lora_bias on a parameter", "plain factors, as in PEFT")
            for parameter, names in parameter_factors(module, depths, settings, self.spec):
                nbytes += self._copied(module, parameter)
                yield from self._parameter(module, parameter, names, settings)
        if nbytes > MAX_STACKED_BYTES:
            expected = f"parameters of at most {MAX_STACKED_BYTES} bytes in float32"
            yield problem(f"{CONFIG_FILE}: target_parameters", f"{nbytes} bytes of parameters", expected)

    def _copied(self, module: str, parameter: str) -> int:
        """Return the size in float32 of a parameter of which the adapter needs a changed copy; 0 for gathered experts
        and for matrices, whose factors are applied as they are."""
        shape = self.spec.parameters[module][parameter]
        is_copied = len(shape) == 3 and module not in self.spec.gathered
        return 4 * math.prod(shape) if is_copied else 0

    def _parameter(
        self, module: str, parameter: str, names: dict[TensorKind, str], settings: LoraSettings
    ) -> Iterator[Problem]:
        rank = settings.rank(f"{module}.{parameter}")
        yield from self._rank(f"{module}.{parameter}", rank)
        yield from self._declared(names, dict.fromkeys(_FACTORS, True))
        shapes = factor_shapes(module, parameter, rank, self.spec)
        if shapes is None:
            yield problem(next(iter(names.values())), "a parameter of neither 2 nor 3 dimensions", "one of either")
            return
        for kind, shape in zip(_FACTORS, shapes, strict=True):
            if kind in names:
                yield from self._shape(names[kind], shape)

    def _invocation(self, settings: LoraSettings) -> Iterator[Problem]:
        """Check that an aLoRA is only factors of linears: PEFT activates linears at the invocation tokens, but would
        apply everything else from the start."""
        if settings.invocation_tokens:
            others = self.tensors.touched() - self.tensors.modules.keys()
            if others or settings.use_dora or settings.lora_bias or settings.bias != "none":
                where = f"{CONFIG_FILE}: alora_invocation_tokens"
                yield problem(where, "an aLoRA that is more than factors of linear layers", "factors alone")


def _missing_target(key: str, target: str) -> Problem:
    where = f"{CONFIG_FILE}: {key}"
    return problem(where, f"{shown(target)} without a tensor", "tensors for every target", "no_target")
