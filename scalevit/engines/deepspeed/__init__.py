"""DeepSpeed ZeRO: settings, engine, cost, and the private names of the library that it needs."""
