"""Runs experiments: each variant is a provider, and its rows contain the predicted time."""

from __future__ import annotations

from ..speed.run import Outcome, Run, first_line
from ..work.batch import Batch
from ..work.providers import Provider
from ..work.workload import Workload
from .variants import Variant


class Experiments(Run):
    """A run whose providers are variants."""

    def describe(self, work: Workload, provider: Provider) -> tuple[str, dict[str, object]]:
        assert isinstance(provider, Variant)
        _, config = super().describe(work, provider)
        return f"experiment {provider.experiment}", config | {
            "predicted_ms": round(provider.cost(work).ms(work, self.floors), 3)
        }

    def attempt(self, provider: Provider, batch: Batch) -> Outcome:
        assert isinstance(provider, Variant)
        with provider.changes():
            if not provider.profile:
                return super().attempt(provider, batch)
            try:
                return self.timed(provider, batch, None)
            except Exception as error:
                return Outcome(f"failed: {type(error).__name__}: {first_line(error)}")
