# An app that runs one bundle on the CPU, without PyTorch.
#   docker build -f docker/cpu.Dockerfile --build-arg BUNDLE=build/bundles/demo -t xadapter .
#   docker run --rm xadapter "The color of a frog is [MASK]."
FROM python:3.13-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY xadapter_export xadapter_export
RUN pip install --no-cache-dir ".[cpu]" && useradd --create-home app
ARG BUNDLE
COPY ${BUNDLE} /bundle
USER app
ENTRYPOINT ["xad-run", "/bundle"]
CMD ["The color of a frog is [MASK]."]
