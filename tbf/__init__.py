"""tbf: pretrain hybrid ternary encoders on old GPUs with DeepSpeed."""

__version__ = "0.1.0"
