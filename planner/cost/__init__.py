"""The cost model, by physical cause: compute, communication, memory, schedule, simulation."""
