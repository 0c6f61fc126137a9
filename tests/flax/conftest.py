from importlib.util import find_spec

if find_spec("jax"):
    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of these tests' time
