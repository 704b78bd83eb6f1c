"""The paper's own experiments on any data set, and data to make them on: `uniad-fast study`, `uniad-fast data`."""
