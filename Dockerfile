# SPDX-License-Identifier: MIT
#
#     docker build -t bus-containers .            (podman and buildah take this file as well)
#     docker run --rm --env BUS_AI_TOKEN bus-containers status
#     docker build --target test .                runs the tests on this Python, as the README says
#
# The program needs no capability, no writable file system and no particular user:
#
#     docker run --rm --read-only --cap-drop all --user 12345 --env BUS_AI_TOKEN bus-containers runs

ARG PYTHON_IMAGE=python:3.14-slim

# The Python that will run the archive builds it, so that the byte code inside fits.
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY bus_containers.py .
COPY zipapp/ zipapp/
RUN python3 zipapp/build.py -o /bus-containers

FROM ${PYTHON_IMAGE} AS test
WORKDIR /src
COPY . .
RUN python3 -m venv .venv && .venv/bin/pip install -q '.[test]' && .venv/bin/pytest

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="bus-containers" \
      org.opencontainers.image.description="Client of the AI Platform's container-run API" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /bus-containers /usr/local/bin/bus-containers
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/bus-containers"]
