"""Calls Python from a kernel that JAX's GPU interpreter runs. Private APIs, for tests only."""

from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory


def call_on_host(self, token, function, *, source_info=None, **operands):
    """Runs `function(memory, thread, logging, **operands)` on the host, in this thread's order."""

    @gpu_callbacks.fail_on_exception
    def on_host(*, token, mesh_location, thread, operands):
        memory = gpu_callbacks._get_shared_memory()
        logging = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
        extra = {} if source_info is None else {"source_info": source_info}
        function(memory, thread, logging, **operands, **extra)
        return token

    return callback.io_callback(
        on_host,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        operands=operands,
    )
