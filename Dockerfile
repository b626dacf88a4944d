# One image for launcher and workers, so that both run the same versions.
#
#   worker:    python -m beam_pipeline --runner=DataflowRunner --sdk_container_image=IMAGE …
#   launcher:  docker run --user nobody --entrypoint python IMAGE -m beam_pipeline \
#                --runner=DataflowRunner --sdk_container_image=IMAGE …
#
# With it, leave --setup_file out: the package is in the image, and workers install nothing when they start.

# Beam's boot program and licences. The version is apache-beam's in constraints.txt.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11-slim
COPY --from=beam /opt/apache/beam /opt/apache/beam

WORKDIR /opt/beam_pipeline
# Dependencies change less often than code: first a layer with them, made from setup.py and an empty package.
COPY setup.py pyproject.toml constraints.txt ./
RUN mkdir beam_pipeline && echo '__version__ = "0"' > beam_pipeline/__init__.py \
    && pip install --no-cache-dir --compile -c constraints.txt '.[launcher]'
COPY beam_pipeline beam_pipeline
# Bytecode (--compile) is made once, here, and not at each worker's start.
RUN pip install --no-cache-dir --compile --no-deps --force-reinstall . && pip check

# Boot runs this Python instead of making a virtual environment of its own.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /tmp
# No USER: Dataflow mounts root's folders into a worker, and boot writes there. The launcher needs no root: --user, above.
ENTRYPOINT ["/opt/apache/beam/boot"]
