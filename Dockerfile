# The command `weakseg` with the shipped bundles, for the CPU and without root rights.
#   docker build --tag weakseg .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" weakseg predict DIR --bundle brats_flair --out OUT
# DIR and OUT are below the current folder, which the container sees as /data.
FROM python:3.12-slim

WORKDIR /src
COPY requirements.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        --extra-index-url https://pypi.org/simple --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY custom_modules custom_modules
COPY bundles bundles
COPY weakseg weakseg
RUN pip install --no-cache-dir --no-deps . && useradd --uid 1000 --create-home weakseg

USER 1000
# a user given by --user has no home
ENV HOME=/tmp MPLCONFIGDIR=/tmp
WORKDIR /data
ENTRYPOINT ["weakseg"]
CMD ["--help"]
