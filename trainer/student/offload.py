"""AdamW whose state lives in host memory: 8 bytes a weight less on the device.

The moments come to the device a piece at a time, the very kernel of the plain optimizer updates them there,
and they go back. So the result is the plain optimizer's to the bit, and a checkpoint of either serves both.
On CUDA the host's pages are pinned; a step moves 16 bytes a weight over the bus.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trainer.parallel.fsdp import is_sharded, own_rows

VALUES_AT_ONCE = 2**26
"""Weights whose state is on the device at once: two moments of 256 MiB."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """torch's AdamW with its state in host memory, each process's of its own part of the weights."""

    deals_out = True
    """Takes its part of a whole state itself."""
    _host: Any = None
    """The processes as they speak to each other from host memory; made at need."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. The state on the host is whole when it returns."""
        assert closure is None, "the gradient stands before the step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies back are asynchronous

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            zeros = torch.zeros_like(_own(parameter), device="cpu")
            state.update({name: self._on_host(zeros.clone(), parameter) for name in MOMENTS})
        weights, gradient = _own(parameter).view(-1), _own(parameter.grad).reshape(-1)
        moments = [_own(state[name]).view(-1) for name in MOMENTS]
        for at in range(0, len(weights), VALUES_AT_ONCE):
            piece = slice(at, at + VALUES_AT_ONCE)
            step = state["step"].to(parameter.device, copy=True)  # counted up by the kernel, once a piece
            _adamw_piece(weights[piece], gradient[piece], [moment[piece] for moment in moments], step, group)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state goes to the host and never through the device."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            rows = own_rows(parameter) if is_sharded(parameter) else slice(None)
            moments = {
                name: self._on_host(saved[name][rows].to("cpu", copy=True), parameter) for name in MOMENTS
            }
            self.state[parameter] = {"step": saved["step"].to("cpu", copy=True), **moments}

    def _on_host(self, own: Tensor, parameter: Any) -> Tensor:
        """This process's values in memory that the device can copy from and to by itself; where the parameter
        is dealt out, as a part of a whole that comes together on the host."""
        own = own.pin_memory() if torch.cuda.is_available() else own
        if not is_sharded(parameter):
            return own
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        mesh = parameter.device_mesh
        if mesh.device_type != "cpu":
            self._host = self._host or init_device_mesh("cpu", (mesh.size(),))
            mesh = self._host
        return DTensor.from_local(
            own, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def _adamw_piece(
    weights: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: dict[str, Any]
) -> None:
    """Updates weights and moments, [n] each, in place; the moments are the host's."""
    near = [moment.to(weights.device, non_blocking=True) for moment in moments]
    adamw(
        [weights],
        [gradient],
        [near[0]],
        [near[1]],
        [],
        [step],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for moment, updated in zip(moments, near, strict=True):
        if updated is not moment:
            moment.copy_(updated, non_blocking=True)


def _own(tensor: Any) -> Tensor:
    """This process's part, which is all of it where nothing is dealt out."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return own
