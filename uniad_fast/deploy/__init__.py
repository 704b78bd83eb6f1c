"""A detector outside this package: exported graphs, and the engines that run them."""
