# CPU image. For a GPU start from a CUDA image of PyTorch and leave torch's pin out of the constraints.
FROM python:3.11-slim

# A C++ compiler for kernels that PyTorch and DeepSpeed build when they are first used.
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ make \
    && rm -rf /var/lib/apt/lists/*

# The folder belongs to the user: runs/ is created in it.
RUN useradd --create-home chatrlhf && install -d -o chatrlhf -g chatrlhf /home/chatrlhf/app
WORKDIR /home/chatrlhf/app
COPY --chown=chatrlhf:chatrlhf . .
RUN pip install --no-cache-dir -c constraints.txt .

USER chatrlhf
ENTRYPOINT ["python", "main.py"]
CMD ["config.yaml", "--type", "ALL"]
