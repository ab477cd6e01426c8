# Triton with a bundle's model repository (xad-export --target triton).
#   docker build -f docker/triton.Dockerfile --build-arg BUNDLE=bundle -t xadapter-triton .
#   docker run --rm --gpus all -p 8000:8000 -p 8001:8001 xadapter-triton
FROM nvcr.io/nvidia/tritonserver:25.06-py3
ARG BUNDLE
COPY ${BUNDLE}/triton /models
EXPOSE 8000 8001 8002
USER triton-server
CMD ["tritonserver", "--model-repository=/models"]
