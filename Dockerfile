# tilert with its CUDA back end, for a host with the NVIDIA container toolkit:
#
#   docker build -t tilert .
#   docker run --gpus all -v /path/to/model:/weights tilert generate /weights --backend cuda --prompt "Hello"
#   docker run --gpus all -v /path/to/model:/weights --entrypoint python tilert /opt/tilert/examples/show_hands.py

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /build \
 && /build/bin/pip install --no-cache-dir -c lock.txt cmake ninja scikit-build-core nanobind numpy ml_dtypes
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .
RUN python3 -m venv /opt/tilert \
 && /opt/tilert/bin/pip install --no-cache-dir -c lock.txt "$(ls /wheels/tilert-*.whl)[cuda]"

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 tilert
COPY --from=build /opt/tilert /opt/tilert
COPY examples /opt/tilert/examples
ENV PATH=/opt/tilert/bin:$PATH \
    MODEL_WEIGHTS_DIR=/weights
USER tilert
WORKDIR /home/tilert
ENTRYPOINT ["tilert"]
CMD ["--help"]
