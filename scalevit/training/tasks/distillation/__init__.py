"""Distillation: settings, runner, teacher."""
