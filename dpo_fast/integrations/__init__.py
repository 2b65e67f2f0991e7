"""Interfaces of other libraries: `liger` (Liger's fused loss), `trl` and `trl_trainer` (TRL's trainers)."""
