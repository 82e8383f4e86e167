"""The catalog as data: devices, networks, instances, models and measured profiles. See README.md."""
