# Two images, each kept to a constraints file:
#   docker build --target command_line --tag autosam .
#   docker build --target serving --tag autosam-serving .
FROM python:3.11-slim-bookworm AS source
RUN useradd --create-home --uid 1000 autosam
WORKDIR /home/autosam/bundles_of_autosam
COPY LICENSE README.md pyproject.toml setup.cfg setup.py constraints.txt constraints-label.txt ./
COPY autosam autosam
COPY components components
COPY adapt adapt
COPY release release
COPY serving serving
COPY study study
COPY --chown=1000 bundles bundles

FROM source AS serving
RUN pip install --no-cache-dir -c constraints-label.txt setuptools \
 && pip install --no-cache-dir --no-build-isolation -c constraints-label.txt -e '.[label]'
USER 1000
EXPOSE 8000
# --host 0.0.0.0 demands a login: docker run --env SERVING_TOKEN=... (docs/serving.md)
ENTRYPOINT ["python", "-m", "serving", "--host", "0.0.0.0", "--app_dir", "/home/autosam/monailabel_app"]

FROM source AS command_line
RUN pip install --no-cache-dir -c constraints.txt -e '.[dicom,formats,onnx]'
USER 1000
WORKDIR /home/autosam/bundles_of_autosam/bundles/cnnhead_acdc
ENTRYPOINT ["python", "-m", "monai.bundle"]
