"""When a training has learnt what it will."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import UniadFastError

_WORTH_WAITING_FOR = 0.01


class Patience:
    """Ends a training whose loss on good images that it has not seen no longer falls.

    It asks for no defect: what it watches is the reconstruction, not the detection.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._lowest = math.inf
        self._waited = 0

    @property
    def ended(self) -> bool:
        return 0 < self._epochs <= self._waited

    def see(self, loss: float) -> None:
        """The loss after another epoch; UniadFastError if it is not finite."""
        if not math.isfinite(loss):
            raise UniadFastError(f"the loss on held-out good images is {loss}")
        if loss < (1 - _WORTH_WAITING_FOR) * self._lowest:
            self._lowest, self._waited = loss, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowest, self._waited = state["lowest"], state["waited"]
