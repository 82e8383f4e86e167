"""The transformer that is trained: readable modules, built from a ModelSpec, whole or one stage of it."""
