"""What ranks find done: the server that they are forked from imports this last.

DeepSpeed collects garbage whenever it partitions a model. What is frozen is left out of that, and the memory that holds
it stays the server's. What vectors the CPU has is found out by a process that imports torch, for each that compiles.
"""

import gc

from torch._inductor.cpu_vec_isa import pick_vec_isa

pick_vec_isa()
gc.collect()
gc.freeze()
