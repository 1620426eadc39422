"""`scalevit plan`: memory, traffic and speed of a run before it is started, per reduction and engine.

`activations` runs the real model on shapes, the engines' `cost` says what they hold and send, `devices` is the table of
devices, `estimate` combines them. Knows models on shapes, engines' settings and the config; must not know process
groups, training or data files.
"""
