import "./styles.css";
import { render } from "preact";
import { App } from "./app";
import { start } from "./session";

start();
render(<App />, document.getElementById("app")!);
