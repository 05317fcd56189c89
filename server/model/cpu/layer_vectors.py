"""The scale and shift vectors of a step's adapters in one decoder layer, as decoder_layer.h reads them."""

import ctypes
from collections.abc import Sequence

from adapters.kernels.segments import SlotRows
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.scale_shift import ScaleShiftPlan, ScaleShiftTables
from adapters.runtime.step import StepPlan
from server.model.cpu.layer_arguments import Layer, Vectors


class LayerVectors:
    """Writes the vectors into the layer's description when they are not those of the step before."""

    def __init__(self, groups: Sequence[LoRAGroup]) -> None:
        self._groups = groups
        self._inputs, self._outputs = groups[0].input_scale_shift, groups[0].scale_shift
        self._chosen: object = ((), ())  # a new description of a layer has no vectors
        self._described: list[ctypes.Array[Vectors]] = []  # what the layer's description points to
        self._fits = True

    def choose(self, layer: Layer, plan: StepPlan) -> bool:
        """Describe the step's vectors in `layer`. Returns False if siblings have different inputs, which the layer
        cannot compute."""
        inputs, outputs = _owned(plan.input_scale_shift), _owned(plan.scale_shift)
        chosen = (inputs and (inputs, self._inputs.version), outputs and (outputs, self._outputs.version))
        if chosen != self._chosen:
            self._chosen, self._fits, self._described = chosen, not self._siblings_differ(inputs), []
            for linears, group in zip(layer.linears(), self._groups, strict=True):
                linears.inputs, linears.num_inputs = self._describe(self._inputs, group, inputs)
                linears.outputs, linears.num_outputs = self._describe(self._outputs, group, outputs)
        return self._fits

    def _describe(
        self, tables: ScaleShiftTables, group: LoRAGroup, owned: Sequence[SlotRows]
    ) -> tuple["ctypes.Array[Vectors] | None", int]:
        """Return the vectors of the group's linears, by the addresses of the tensors in `tables`, and their number."""
        found = [
            Vectors(rows.start, rows.end, low, vectors.shape[1], vectors.data_ptr())
            for rows in owned
            for name, (low, _) in zip(group.names, group.spans, strict=True)
            if (vectors := tables.vectors(rows.slot, name)) is not None
        ]
        if not found:
            return None, 0
        self._described.append((Vectors * len(found))(*found))
        return self._described[-1], len(found)

    def _siblings_differ(self, inputs: Sequence[SlotRows]) -> bool:
        names = [name for group in self._groups if len(group.names) > 1 for name in group.names]
        return any(self._inputs.vectors(rows.slot, name) is not None for rows in inputs for name in names)


def _owned(plan: ScaleShiftPlan | None) -> tuple[SlotRows, ...]:
    return () if plan is None else plan.owned
