"""minigen: Generative Adapter (arXiv 2411.05877) to read, run and change. One pass over a text, and the LM knows it."""

from .formats import load_generator, save_generator, save_peft
from .generator import Adapter, AdapterGenerator, ContextState, GeneratorConfig
from .models import answer, load_lm
from .polar import polar_norm

__all__ = ["Adapter", "AdapterGenerator", "ContextState", "GeneratorConfig", "answer", "load_generator", "load_lm", "polar_norm", "save_generator", "save_peft"]
