"""Problems that the person at the keyboard can solve, and how full memory is told. Imports nothing."""


class UserError(Exception):
    """An expected problem: a missing file, a corrupt record, a wrong option.

    The message is one or two sentences: what is wrong, where, and what to do. The `cacr` command prints it without a
    traceback and exits with status 2; of several processes the first one prints it.
    """


class ProcessError(UserError):
    """A problem that one process of several can have alone, such as full memory: each prints its own."""


#: what torch, the CUDA libraries and the operating system say when memory is full
FULL_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "annot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a GPU is full."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FULL_MEMORY)
    )
