"""`scalevit plan`: memory, traffic and speed of a run before it is started, per reduction strategy and engine.

`trace` runs the real model on shapes, `engines` knows what each engine holds and sends, `devices` are stated numbers,
`estimate` puts them together, `command` prints. Nothing here trains, and no training code depends on it.
"""
