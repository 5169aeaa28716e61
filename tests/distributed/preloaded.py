"""What ranks find done, as the server that they are forked from imports this last: their garbage collector does not look
through what was imported, and what compiles on CPUs knows what this one can do.

DeepSpeed collects garbage whenever it partitions a model. Frozen objects are left out of that, and the memory they lie
in stays the server's. What vectors a CPU has is found out by a process that imports torch, once in each that compiles.
"""

import gc

from torch._inductor.cpu_vec_isa import pick_vec_isa

pick_vec_isa()
gc.collect()
gc.freeze()
