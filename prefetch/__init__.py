"""Which experts next. This package knows demand and residency as sets; not how a model computes or how bytes move."""
