//! The model's own chat template, which is Jinja, by minijinja.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, State, context};
use sarai_core::request::{Message, Role, Tool, ToolCall};
use serde::Serialize;

use super::tools;

/// Steps that a template may take. A real one takes some tens for each message; one that never ends stops here.
const FUEL: u64 = 50_000_000;

/// For models without a template of their own: each message under its role, in the markers most models know.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The words that a template may use for the first and the last token.
#[derive(Debug)]
pub(super) struct Markers {
    pub(super) bos: String,
    pub(super) eos: String,
}

/// What a template is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversation<'a> {
    pub(super) messages: &'a [Message],
    pub(super) tools: &'a [Tool],
    pub(super) markers: &'a Markers,
    /// What stands for each image and audio, before its message's text.
    pub(super) medium: &'a str,
    /// Whether the model is to speak next.
    pub(super) to_be_answered: bool,
}

/// The text of a conversation, up to where the model is to speak.
pub(super) fn render(template: Option<&str>, conversation: &Conversation<'_>) -> Result<String, Error> {
    let Conversation { messages, tools, markers, medium, to_be_answered } = *conversation;
    let mut calls = CallIds::default();
    let messages: Vec<Value> = messages.iter().map(|each| message(each, medium, &mut calls)).collect();
    let tools: Vec<Value> = tools.iter().map(|tool| Value::from(Serde(tools::described(tool)))).collect();
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format));
    environment.add_filter("tojson", python_json);
    environment.template_from_str(template.unwrap_or(CHATML))?.render(context! {
        messages => messages,
        tools => if tools.is_empty() { Value::from(()) } else { Value::from(tools) },
        add_generation_prompt => to_be_answered,
        bos_token => markers.bos.as_str(),
        eos_token => markers.eos.as_str(),
    })
}

/// A message as templates know it: keys that do not apply are absent, because templates ask for them.
fn message(message: &Message, medium: &str, calls: &mut CallIds) -> Value {
    let content = medium.repeat(message.images.len() + message.audio.len()) + &message.content;
    let mut fields = vec![("role", Value::from(message.role.as_str())), ("content", content.into())];
    if !message.tool_calls.is_empty() {
        let call = |call: &ToolCall| {
            let function =
                context! { name => call.name.as_str(), arguments => Value::from(Serde(&call.arguments)) };
            context! { id => calls.made(&call.name), type => "function", function => function }
        };
        fields.push(("tool_calls", message.tool_calls.iter().map(call).collect()));
    }
    if message.role == Role::Tool {
        fields.push(("tool_call_id", calls.answered(message.tool_name.as_deref()).into()));
    }
    fields.extend(message.tool_name.as_deref().map(|name| ("name", Value::from(name))));
    Value::from_pairs(fields)
}

/// Numbers the calls of a conversation, in the form that the strictest templates ask for (Mistral's: nine letters and
/// digits), and finds the call that a result belongs to. The same conversation always gives the same.
#[derive(Debug, Default)]
struct CallIds {
    made: usize,
    /// Those without a result, by id and name.
    open: Vec<(String, String)>,
}

impl CallIds {
    fn made(&mut self, name: &str) -> String {
        self.made += 1;
        let id = format!("call{:05}", self.made % 100_000);
        self.open.push((id.clone(), name.to_owned()));
        id
    }

    /// The id of the first call of that tool without a result, or of any.
    fn answered(&mut self, name: Option<&str>) -> String {
        let named = self.open.iter().position(|(_, open)| Some(open.as_str()) == name);
        if named.is_none() && self.open.is_empty() {
            // A result without a call: its own is as good as any.
            self.made(name.unwrap_or_default());
        }
        self.open.remove(named.unwrap_or(0)).0
    }
}

/// JSON as Python writes it: with a blank after commas and colons. Models were trained on that.
#[expect(clippy::needless_pass_by_value, reason = "the form that a filter has to have")]
fn python_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut written = Vec::new();
    let done = match indent {
        Some(width) => {
            let blanks = vec![b' '; width.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&blanks);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut written, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut written, Spaced)),
    };
    done.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&written).into_owned()))
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The methods of Python's strings and dictionaries that templates call.
fn python_method(
    _: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    if method == "items" || method == "keys" || method == "values" || method == "get" {
        return python_dict_method(value, method, arguments);
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let (first, second) =
        (arguments.first().and_then(Value::as_str), arguments.get(1).and_then(Value::as_str));
    let strips = |c: char| first.map_or_else(|| c.is_whitespace(), |set| set.contains(c));
    Ok(match (method, first) {
        ("strip", _) => text.trim_matches(strips).into(),
        ("lstrip", _) => text.trim_start_matches(strips).into(),
        ("rstrip", _) => text.trim_end_matches(strips).into(),
        ("upper", _) => text.to_uppercase().into(),
        ("lower", _) => text.to_lowercase().into(),
        ("title" | "capitalize", _) => {
            let mut letters = text.chars();
            letters
                .next()
                .map(|c| c.to_uppercase().chain(letters).collect::<String>())
                .unwrap_or_default()
                .into()
        }
        ("startswith", Some(start)) => text.starts_with(start).into(),
        ("endswith", Some(end)) => text.ends_with(end).into(),
        ("find", Some(part)) => text.find(part).map_or(-1, |at| text[..at].chars().count() as i64).into(),
        ("count", Some(part)) => text.matches(part).count().into(),
        ("replace", Some(old)) => text.replace(old, second.unwrap_or("")).into(),
        ("split", Some(separator)) => text.split(separator).map(str::to_owned).collect(),
        ("split", None) => text.split_whitespace().map(str::to_owned).collect(),
        ("splitlines", _) => text.lines().map(str::to_owned).collect(),
        ("join", _) => {
            let parts = arguments.first().ok_or_else(unknown)?.try_iter()?.map(|part| part.to_string());
            parts.collect::<Vec<_>>().join(text).into()
        }
        _ => return Err(unknown()),
    })
}

fn python_dict_method(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let keys = || value.try_iter();
    match method {
        "items" => keys()?.map(|key| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]))).collect(),
        "keys" => Ok(keys()?.collect()),
        "values" => keys()?.map(|key| value.get_item(&key)).collect(),
        _ => {
            let (key, default): (Value, Option<Value>) = minijinja::value::from_args(arguments)?;
            let found = value.get_item(&key)?;
            Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
        }
    }
}

/// Today, in the few forms templates ask for; UTC, because a library does not know its user's time zone.
fn strftime(format: &str) -> Result<String, Error> {
    let days = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, "this machine's clock is before 1970"))?
        .as_secs()
        / 86_400;
    let (year, month, day) = civil(days as i64);
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = MONTHS[(month - 1) as usize];
    Ok(format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{month:02}"))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3]))
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
/// Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers() -> Markers {
        Markers { bos: "<s>".into(), eos: "</s>".into() }
    }

    fn say(template: &str) -> Result<String, Error> {
        let messages = [Message::system(" Be brief. "), Message::user("Hi")];
        say_with(Some(template), &messages, &[])
    }

    fn say_with(template: Option<&str>, messages: &[Message], tools: &[Tool]) -> Result<String, Error> {
        render(
            template,
            &Conversation { messages, tools, markers: &markers(), medium: "", to_be_answered: true },
        )
    }

    #[test]
    fn tools_their_calls_and_results_reach_the_template_as_python_would_write_them() {
        let tool = Tool {
            name: "weather".into(),
            description: "<now>".into(),
            parameters: serde_json::json!({ "type": "object", "properties": {} }),
        };
        let call = ToolCall {
            name: "weather".into(),
            arguments: serde_json::json!({ "city": "Alcalá" }).as_object().unwrap().clone(),
        };
        let messages =
            [Message::assistant("").with_tool_calls(vec![call]), Message::tool("weather", "sunny")];
        let template = "{% if tools %}{{ tools | tojson }}{% endif %}\
            {% for m in messages %}{% for c in m.tool_calls or [] %}|{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}\
            {% if m.role == 'tool' %}|{{ m.name }}={{ m.content }}{% endif %}{% endfor %}";
        let text = say_with(Some(template), &messages, std::slice::from_ref(&tool)).unwrap();
        assert_eq!(
            text,
            "[{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"description\": \"<now>\", \
             \"parameters\": {\"type\": \"object\", \"properties\": {}}}}]\
             |weather{\"city\": \"Alcalá\"}|weather=sunny"
        );
        assert_eq!(
            say_with(Some("{% if tools %}x{% endif %}{{ tools is none }}"), &messages, &[]).unwrap(),
            "True"
        );
    }

    /// What Mistral's templates ask of calls and results.
    const STRICT: &str = "{% for m in messages %}\
        {% for c in m.tool_calls or [] %}\
        {% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('calls need ids of length 9') }}{% endif %}\
        {{ c.function.name }}:{{ c.id }} {% endfor %}\
        {% if m.role == 'tool' %}\
        {% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('results, too') }}{% endif %}\
        {{ m.content }}:{{ m.tool_call_id }} {% endif %}{% endfor %}";

    #[test]
    fn calls_have_ids_that_their_results_repeat() {
        let call = |name: &str| ToolCall { name: name.into(), arguments: serde_json::Map::new() };
        let asks = |names: &[&str]| {
            Message::assistant("").with_tool_calls(names.iter().map(|name| call(name)).collect())
        };
        let messages = [
            Message::user("Hi"),
            asks(&["sun", "rain", "sun"]),
            Message::tool("rain", "r1"),
            Message::tool("sun", "s1"),
            Message::tool("sun", "s2"),
            asks(&["rain"]),
            Message { tool_name: None, ..Message::tool("", "r2") },
            Message::tool("snow", "nobody asked"),
        ];
        let text = say_with(Some(STRICT), &messages, &[]).unwrap();
        assert_eq!(
            text,
            "sun:call00001 rain:call00002 sun:call00003 r1:call00002 s1:call00001 s2:call00003 \
             rain:call00004 r2:call00004 nobody asked:call00005 "
        );
        assert_eq!(say_with(Some(STRICT), &messages, &[]).unwrap(), text, "the same every time");
    }

    #[test]
    fn a_models_own_template_is_followed() {
        let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}\
            {% if add_generation_prompt %}[assistant]{% endif %}";
        assert_eq!(say(template).unwrap(), "<s>[system] Be brief.</s>[user] Hi</s>[assistant]");
    }

    #[test]
    fn the_python_that_templates_use_works() {
        let template = "{{ messages[0].content.strip() }}|{{ messages[0]['role'].startswith('sys') }}|\
            {{ 'a,b'.split(',')[-1] }}|{{ messages[1].get('tool', 'none') }}|{{ 'x'.join(['1', '2']) }}|\
            {% for key, value in messages[1].items() %}{{ key }}={{ value }};{% endfor %}";
        assert_eq!(say(template).unwrap(), "Be brief.|True|b|none|1x2|role=user;content=Hi;");
    }

    #[test]
    fn a_template_may_refuse_the_messages_in_its_own_words() {
        let error = say("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
            {% endfor %}{% endfor %}{% endfor %}";
        assert_eq!(say(endless).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn without_a_template_the_messages_stand_under_their_roles() {
        let text = say_with(None, &[Message::user("Hi")], &[]).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn dates_are_counted_right() {
        assert_eq!((civil(0), civil(11_016), civil(20_635)), ((1970, 1, 1), (2000, 2, 29), (2026, 7, 1)));
    }
}
