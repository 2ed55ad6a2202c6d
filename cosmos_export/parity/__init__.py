"""Is a bundle equal to its model? `cases` are run by the runtime and by the `reference`, `metrics` measure, `gates` judge."""
