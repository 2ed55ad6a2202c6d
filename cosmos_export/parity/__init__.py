"""Is a bundle equal to its model? The runtime and the `reference` run the `cases`, `metrics` measure, `gates` judge."""
