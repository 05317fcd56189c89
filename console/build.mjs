// Bundles the console into server/console/static/, or into the folder that is given. The names have digests, so that browsers may keep the files for ever.
// `sources.sha256` has the digest of everything that the bundle is made of: a test compares it with the sources.
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, parse } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const root = fileURLToPath(new URL(".", import.meta.url));
const target = process.argv[2] ?? join(root, "../server/console/static");
const LIMIT = 300_000;

const options = {
  entryPoints: { console: join(root, "src/main.tsx") },
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022"],
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  outdir: target,
  write: false,
  logLevel: "info",
};

function sources(folder, prefix) {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) =>
    entry.isDirectory() ? sources(join(folder, entry.name), `${prefix}${entry.name}/`) : [`${prefix}${entry.name}`],
  );
}

function digestOfSources() {
  const files = ["build.mjs", "index.html", "package-lock.json", "package.json", ...sources(join(root, "src"), "src/")];
  const hash = createHash("sha256");
  for (const name of files.sort()) hash.update(`${name}\0`).update(readFileSync(join(root, name))).update("\0");
  return hash.digest("hex");
}

/** Writes a file under a name with the digest of its content, and returns the name. */
function write({ path, contents }) {
  const { name, ext } = parse(path);
  const named = `${name}-${createHash("sha256").update(contents).digest("hex").slice(0, 10)}${ext}`;
  writeFileSync(join(target, named), contents);
  return named;
}

function writePage(names) {
  const page = readFileSync(join(root, "index.html"), "utf8")
    .replace("SCRIPT", names.find((name) => name.endsWith(".js")))
    .replace("STYLE", names.find((name) => name.endsWith(".css")));
  writeFileSync(join(target, "index.html"), page);
  writeFileSync(join(target, "sources.sha256"), `${digestOfSources()}\n`);
}

rmSync(target, { recursive: true, force: true });
mkdirSync(target, { recursive: true });
const { outputFiles } = await esbuild.build(options);
writePage(outputFiles.map(write));
const total = readdirSync(target).reduce((sum, name) => sum + readFileSync(join(target, name)).length, 0);
console.log(`${total} bytes in all`);
if (total > LIMIT) throw new Error(`the console may have ${LIMIT} bytes`);
