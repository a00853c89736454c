# CPU image; for a GPU start from a CUDA image of PyTorch and leave torch's pin out of the constraints.
FROM python:3.11-slim

RUN apt-get update && apt-get install --no-install-recommends -y g++ make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home chatrlhf
WORKDIR /home/chatrlhf/app
COPY --chown=chatrlhf . .
RUN pip install --no-cache-dir -c constraints.txt .
USER chatrlhf
ENTRYPOINT ["python", "main.py"]
CMD ["--help"]
