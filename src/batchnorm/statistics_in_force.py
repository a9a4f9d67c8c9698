"""Which running statistics of a layer are in force: its own, or those of a domain."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm import validation
from batchnorm.buffers import DomainStatistics, RunningStatistics
from batchnorm.domain import active_domain, check_name
from batchnorm.errors import MissingStatisticsError
from batchnorm.population import Tracking


class Populations(RunningStatistics):
    """A layer's own running statistics, and those of every domain it knows."""

    momentum: float | None
    running_var_correction: int
    on_nonfinite: str
    frozen_statistics: bool

    def population(self) -> Tracking | None:
        """Give the statistics in force: the layer's own, or those of the active domain.

        Returns
        -------
        Tracking or None
            The very buffers, and how a batch moves them; None where the layer tracks nothing.

        Raises
        ------
        MissingStatisticsError
            The active domain is unknown to the layer.
        """
        validation.check_momentum(self.momentum)
        # nn.Module finds a buffer only after it has looked everywhere else
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None:
            validation.check_both_or_neither(mean, var)
            return None
        name = active_domain()
        return self._tracked(self if name is None else self._domain(name))

    def populations(self) -> list[Tracking]:
        """Give the statistics of the layer and of every domain it knows.

        Returns
        -------
        list of Tracking
            The layer's own first; empty where it tracks nothing.
        """
        if self._buffers["running_mean"] is None:
            return []
        return [self._tracked(holder) for holder in self._holders()]

    def _tracked(self, holder: RunningStatistics) -> Tracking:
        return holder._tracking(self.momentum, self.running_var_correction, self.on_nonfinite == "skip")

    def _holders(self) -> list[RunningStatistics]:
        return [self, *(self._domain(name) for name in self._known())]

    def _lacks(self, name: str) -> bool:
        return self._buffers["running_mean"] is not None and name not in self._known()

    def _known(self) -> tuple[str, ...]:
        domains = self._modules.get("domains")
        return () if domains is None else tuple(domains._modules)

    def _domain(self, name: str) -> DomainStatistics:
        known = self._known()
        if name not in known:
            raise MissingStatisticsError(
                f"batch_norm: no statistics of the domain {name!r}; there are {', '.join(known) or 'none'}.",
                why="inference needs the statistics of training in that domain.",
                mend="train or calibrate inside the domain first, or leave the `with batchnorm.domain` block.",
            )
        return self.domains[name]  # type: ignore[return-value]

    def add_domain(self, name: str) -> DomainStatistics:
        """Give the statistics of a domain, and begin them at mean 0 and variance 1 where there are none.

        A layer does this by itself when it first trains in a domain. Call it before ``torch.compile``:
        a compiled forward cannot make buffers.

        Parameters
        ----------
        name : str
            The domain.

        Returns
        -------
        DomainStatistics
            Its buffers.
        """
        if name not in self._known():
            mean = self._buffers["running_mean"]
            if mean is None:
                raise validation.missing_statistics()
            check_name(name)
            if "domains" not in self._modules:
                self.domains = nn.ModuleDict()
            self.domains[name] = DomainStatistics(len(mean), mean.device, mean.dtype)
        return self.domains[name]  # type: ignore[return-value]

    def reset_running_stats(self) -> None:
        """Set mean 0, variance 1 and every count 0, in every domain; frozen statistics stay as they are."""
        # torch's constructor resets before there is anything else
        if not self.__dict__.get("frozen_statistics"):
            for holder in self._holders():
                holder._restart()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        start, end = f"{prefix}domains.", ".running_mean"
        if self._buffers["running_mean"] is not None:
            for key in state_dict:
                if key.startswith(start) and key.endswith(end):
                    self.add_domain(key[len(start) :].split(".")[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)
