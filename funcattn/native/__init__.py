"""C++ operators, compiled at their first use; without them everything works, more slowly.

building    load: compile, cache, register with torch; or the reason why not
products.h  the arithmetic of products; floats.h that of the operations between them; lanes.h the
            vector instructions of both (AVX2, AVX-512 VNNI)
products.cpp  funcattn::products: matrices times vectors
coded.cpp   funcattn::coded_attend: attention over a past in codes, of which coded_table says where
              it is in memory; codes.h its arithmetic
layers.cpp  funcattn::layers: all layers of a decoder for a few tokens of one text or of several;
              matrices.h is common
decoder.cpp   funcattn::plan: where the matrices of a decoder are in memory, which layers.cpp and
              prompts.cpp are given
dense.cpp   funcattn::linear: a matrix of floats times many vectors; many.h what is common to
prompts.cpp   funcattn::prompt: all layers of a decoder for many tokens of one text
rounded.cpp   products of matrices in tiles with many vectors of 8 bits
words.cpp   funcattn::words: random words, by the cipher of cipher.h
attention   attention.cpp: funcattn::native_attend and native_attend_jvp; forward.h their
              arithmetic on the products and the exponential of gemm.h; vectors.h the vectors
              of each processor. contract.cpp: funcattn::native_contract; contract.h its
              interpreter, pairs.h its products of bfloat16, work.h the room of a task
targets.h   regions of code for instructions that the processor is asked for at run time
"""

from .building import instructions, is_loaded, load, model_name, once, packaged

__all__ = ["instructions", "is_loaded", "load", "model_name", "once", "packaged"]
