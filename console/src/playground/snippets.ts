// A request as code. The key is never in it.
import { key } from "../api";
import type { Body } from "./request";

export const LANGUAGES = ["curl", "Python", "Node"] as const;
export type Language = (typeof LANGUAGES)[number];

/** Fields that OpenAI's clients send only as extra ones. */
const EXTRA = ["top_k", "repetition_penalty"];

export function snippet(language: Language, body: Body): string {
  return { curl, Python: python, Node: node }[language](body);
}

function curl(body: Body): string {
  const json = JSON.stringify(body, null, 2).replaceAll("'", `'\\''`);
  const auth = key.value ? ` \\\n  -H "Authorization: Bearer $LORAPLEX_API_KEY"` : "";
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d '${json}'`;
}

function python(body: Body): string {
  const known = Object.entries(body).filter(([name]) => !EXTRA.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.includes(name)));
  const given = known.map(([name, value]) => `    ${name}=${literal(value, 4)},\n`).join("");
  const more = Object.keys(extra).length ? `    extra_body=${literal(extra, 4)},\n` : "";
  const secret = key.value ? `os.environ["LORAPLEX_API_KEY"]` : `"none"`;
  return `${key.value ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${secret})\nanswer = client.chat.completions.create(\n${given}${more})\nprint(answer.choices[0].message.content)`;
}

function literal(value: unknown, indent: number): string {
  const pad = " ".repeat(indent + 4);
  const close = " ".repeat(indent);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Array.isArray(value) ? value.map((item) => literal(item, indent + 4)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, indent + 4)}`);
  const [open, end] = Array.isArray(value) ? "[]" : "{}";
  const line = `${open}${items.join(", ")}${end}`;
  return line.length < 80 && !line.includes("\n") ? line : `${open}\n${items.map((item) => `${pad}${item},\n`).join("")}${close}${end}`;
}

function node(body: Body): string {
  const secret = key.value ? "process.env.LORAPLEX_API_KEY" : `"none"`;
  const json = JSON.stringify(body, null, 2);
  return `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${location.origin}/v1", apiKey: ${secret} });\nconst answer = await client.chat.completions.create(${json});\nconsole.log(answer.choices[0].message.content);`;
}
