# docker build -t rl_soft . ; docs/slurm.md. Not built yet by those who wrote it.
FROM python:3.12-slim

# g++ compiles DeepSpeed's optimizer and the rollout's CPU kernels; git names the commit in reports.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*

WORKDIR /rl_soft
COPY . .
# The installation of launch.sh, with the versions of constraints.txt.
RUN ./launch.sh recipes

ENTRYPOINT ["./launch.sh"]
CMD ["--help"]
