"""Where there is no GPU, the kernels of move_triton.py run in Triton's interpreter, which must be told before the import."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
