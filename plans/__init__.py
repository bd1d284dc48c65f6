"""Plans: pure functions (name, shape, mesh) -> one placement for each of (fsdp, sp, ep).

Each module holds one plan, a function of the module's name.
"""
