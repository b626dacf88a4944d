# One image for the launcher, the Flex Template and the workers, so that all run the same versions. Build, publish and
# run: docs/dataflow.md.
#
# Everything is pinned: every Python package by constraints.txt, base images by tag (their digests were not looked up).

# Beam's boot program and licences. The version is apache-beam's in constraints.txt.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

# The program that starts a Flex Template. The tag is that of Google's own sample of a single image; others:
# https://cloud.google.com/dataflow/docs/reference/flex-templates-base-images
FROM gcr.io/dataflow-templates-base/python311-template-launcher-base:20230622_RC00 AS template

FROM python:3.11.15-slim-bookworm AS pipeline
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=template /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher

WORKDIR /opt/beam_pipeline
# Dependencies change less often than code: first a layer with them, made from setup.py and an empty package. The build
# folder goes again, since setuptools would take the empty package from there, which is newer than the code. Bytecode
# is compiled here, Python's own too (its image comes without), and not at each start of a container.
COPY setup.py pyproject.toml constraints.txt ./
RUN mkdir beam_pipeline && echo '__version__ = "0"' > beam_pipeline/__init__.py \
    && pip install --no-cache-dir --no-compile --constraint=constraints.txt setuptools \
    && pip install --no-cache-dir --no-compile --no-build-isolation --constraint=constraints.txt '.[launcher]' \
    && rm -r build beam_pipeline ./*.egg-info \
    && python -m compileall -q -j 0 /usr/local/lib/python3.11
COPY beam_pipeline beam_pipeline
RUN pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall . && pip check

# A Flex Template's launcher runs this file. It lies alone in its folder: Python puts that first in the module path.
COPY beam_pipeline/__main__.py /template/main.py
# For a template that compares trainings instead: docs/comparison.md.
COPY beam_pipeline/compare.py /template_compare/main.py
WORKDIR /template
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/main.py

# Boot runs this Python instead of making a virtual environment of its own.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 PYTHONUNBUFFERED=1 HOME=/tmp

# No USER: on Dataflow both programs need root, boot for folders that are mounted as root's, the template launcher for
# its log below /var/log. Where Dataflow is only called, nobody is enough: docker run --user=nobody --entrypoint=python.

# A worker is started with --id and --provision_endpoint, which are all that boot requires; its other modes are
# --worker_pool and --setup_only (sdks/python/container/boot.go). A Flex Template's launcher gets none of these. Go takes
# flags with one dash or two.
ENTRYPOINT ["/bin/sh", "-c", "for word in \"$@\"; do case \"$word\" in -id|-id=*|--id|--id=*|-provision_endpoint*|--provision_endpoint*|-worker_pool*|--worker_pool*|-setup_only*|--setup_only*) exec /opt/apache/beam/boot \"$@\";; esac; done; exec /opt/google/dataflow/python_template_launcher \"$@\"", "entrypoint"]

# The same with TensorFlow, for --compute: docker build --target=compute …
FROM pipeline AS compute
WORKDIR /opt/beam_pipeline
RUN pip install --no-cache-dir --no-compile --no-build-isolation --constraint=constraints.txt '.[compute]' && pip check \
    && python -m compileall -q -j 0 /usr/local/lib/python3.11
WORKDIR /template

# Without --target: the one without TensorFlow.
FROM pipeline
